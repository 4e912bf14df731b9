// Matrix products as the launchers of inference describe them (ops.cpp, ops_block.cpp).
#pragma once

#include <optional>
#include <vector>

#include "launch.h"

namespace deit {

void run_product(ProductArgs args);

Tensor linear_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 Activation activation, const std::optional<Tensor>& residual,
                 const std::optional<Tensor>& gamma, const std::optional<Tensor>& keep);
// x wT + bias, the weight in thirds: `weight`, then the two others. No others: `weight` is all.
Tensor linear_of_thirds(const Tensor& x, const Tensor& weight, const std::vector<Tensor>& others,
                        const std::optional<Tensor>& bias);
Tensor gelu_mlp_of(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                   const Tensor& w2, const std::optional<Tensor>& b2,
                   const std::optional<Tensor>& residual, const std::optional<Tensor>& gamma,
                   const std::optional<Tensor>& keep);

// A matrix as the products read it: contiguous, its rows whole words.
inline const void* matrix(const char* name, Tensor& value, ScalarType type) {
  STD_TORCH_CHECK(value.scalar_type() == type, name, ": expected the product's dtype");
  if (!value.is_contiguous()) value = torch::stable::contiguous(value);
  return value.const_data_ptr();
}

// Makes `args`, which describes the first third of a weight, describe all of it: `held` keeps the
// others as they are read.
inline void add_thirds(ProductArgs& args, const std::vector<Tensor>& others, Tensor (&held)[2]) {
  const ScalarType type = args.type == Scalar::bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  const int64_t depth = args.depth * (args.type == Scalar::bf16 ? 2 : 1);
  STD_TORCH_CHECK(args.width % 16 == 0, "weight: expected thirds of a multiple of 16 rows");
  for (size_t i = 0; i < 2; ++i) {
    held[i] = others.at(i);
    STD_TORCH_CHECK(held[i].dim() == 2 && held[i].size(0) == args.width &&
                        held[i].size(1) == depth,
                    "weight: expected thirds of one shape");
    args.others[i] = matrix("weight", held[i], type);
  }
  args.part = args.width;
  args.width *= 3;
}

// One product's description, and the tensors that its pointers point into.
struct Product {
  ProductArgs args{};
  Tensor x, weight, residual, held[3], thirds[2], out;

  Product(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias,
          const std::vector<Tensor>& others = {})
      : x(x_in), weight(weight_in), out(x_in) {
    STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1),
                    "weight: expected [M, K] for x [..., K]");
    STD_TORCH_CHECK(weight.size(1) > 0, "x: expected a depth of at least 1");
    args.type = args.out_type = scalar_of("x", x);
    STD_TORCH_CHECK(args.type != Scalar::f16, "x: expected fp32 or bf16");
    const int64_t inputs_a_word = args.type == Scalar::bf16 ? 2 : 1;
    STD_TORCH_CHECK(weight.size(1) % inputs_a_word == 0, "x: expected an even depth in bf16");
    args.depth = weight.size(1) / inputs_a_word;
    args.width = weight.size(0);
    args.rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) args.rows *= x.size(d);
    const ScalarType type = x.scalar_type();
    args.x = matrix("x", x, type);
    args.weight = matrix("weight", weight, type);
    if (!others.empty()) add_thirds(args, others, thirds);
    args.bias = parameter("bias", bias, args.width, x, held[0]);
  }

  void add_epilogue(const Tensor& like, const std::optional<Tensor>& residual_in,
                    const std::optional<Tensor>& gamma, const std::optional<Tensor>& keep) {
    args.gamma = parameter("gamma", gamma, args.width, like, held[1]);
    if (keep.has_value()) {
      args.keep = parameter("keep", keep, like.size(0), like, held[2]);
      args.rows_per_sample = args.rows / std::max<int64_t>(1, like.size(0));
    }
    if (residual_in.has_value()) {
      STD_TORCH_CHECK(residual_in->numel() == args.rows * args.width,
                      "residual: expected the output's shape");
      residual = *residual_in;
      args.out_type = scalar_of("residual", residual);
      STD_TORCH_CHECK(args.out_type == args.type || args.out_type == Scalar::f32,
                      "residual: expected x's dtype or fp32");
      args.residual = matrix("residual", residual, residual.scalar_type());
    }
  }

  // [..., width] for `like` [..., K], in the residual's dtype where there is one.
  void allocate_out(const Tensor& like) {
    std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
    sizes.back() = args.width;
    out = torch::stable::new_empty(args.residual ? residual : like, sizes);
    args.out = out.mutable_data_ptr();
  }
};

}  // namespace deit
