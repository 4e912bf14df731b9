// Linear layers as their launchers describe them, and what those share.
#pragma once

#include <vector>

#include "launch_training.h"

namespace deit {

// A product over all threads, planned for them.
void run_product(ProductArgs args);
// Packs the weight of `args`, planned, which then reads the buffer.
Buffer pack(ProductArgs& args);

Tensor linear_of(const Tensor& x, const Tensor& weight, const Optional& bias,
                 Activation activation, const Optional& residual,
                 const Optional& gamma, const Optional& keep);
// x wT + bias, the weight in thirds: `weight`, then the two others. Without others `weight` is all.
Tensor linear_of_thirds(const Tensor& x, const Tensor& weight, const std::vector<Tensor>& others,
                        const Optional& bias);
Tensor gelu_mlp_of(const Tensor& x, const Tensor& w1, const Optional& b1,
                   const Tensor& w2, const Optional& b2,
                   const Optional& residual, const Optional& gamma,
                   const Optional& keep, Activation activation = Activation::gelu);

// For training alone. `contiguous` refuses what is not in the operands' dtype, fp32 or bf16.
inline Tensor contiguous(const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  ": expected fp32 or bf16");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected the product's dtype");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
// The same of what may be in fp32 beside operands in bf16: a residual, and its output's gradient.
inline Tensor contiguous_stream(const char* name, const Tensor& tensor, ScalarType type) {
  const bool wide = tensor.scalar_type() == ScalarType::Float;
  return contiguous(name, tensor, wide ? ScalarType::Float : type);
}
inline int64_t in_word(ScalarType type) { return type == ScalarType::BFloat16 ? 2 : 1; }
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t size) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = size;
  return sizes;
}

void check_linear(const Tensor& x, const Tensor& weight, const char* name);
// `dout` is shaped as the output of the layer `weight` on x, where that is given.
void check_gradient(const Tensor& dout, const Optional& x, const Tensor& weight, const char* name,
                    const char* message = "dout: expected the output's shape");
// g = keep * gamma * dout * activation'(affine) in `type`, dout itself where it may be, and dgamma.
std::tuple<Tensor, Tensor> output_gradient(const Tensor& dout, const Optional& affine,
                                           Activation activation, const Optional& gamma,
                                           const Optional& keep, ScalarType type, bool wants_g,
                                           bool wants_gamma);
// dweight [M, K] and dbias [M] of a layer whose output's gradient is g [T, M] and input x [T, K],
// which is read for dweight alone.
std::tuple<Tensor, Tensor> weight_gradient(const Tensor& g, const Optional& x, bool wants_weight,
                                           bool wants_bias);
// One that is described, in blocks for the threads that there are.
void run_weight_gradient(WeightGradientArgs& args);
// a [.., K] times [K, width] -> out, described; `pack_operand` gives it the right operand. K is whole
// words.
TrainingProductArgs product_of(const Tensor& a, int64_t width, const Tensor& out);
// g with a column of zeros more where its rows do not end with a word: an odd number of outputs in
// bf16.
Tensor in_whole_words(const Tensor& g);
// Packs `b` as the right operand of `args`: [width, depth] where transposed, else [depth, width].
Buffer pack_operand(TrainingProductArgs& args, const Tensor& b, bool transposed);
// A product over all threads.
void run_product(const TrainingProductArgs& args);
// g weight, [.., K], shaped as the layer's input.
Tensor input_gradient(const Tensor& g, const Tensor& weight);

// What linear and gelu_mlp have behind their last product.
struct Epilogue {
  Held bias_held, gamma_held, keep_held;
  Tensor residual_held;
  void describe(const Tensor& x, int64_t width, const Optional& bias, const Optional& residual,
                const Optional& gamma, const Optional& keep, TrainingProductArgs& args) {
    args.bias = parameter("bias", bias, width, x, bias_held);
    args.gamma = parameter("gamma", gamma, width, x, gamma_held);
    if (keep.has_value()) {
      args.keep = parameter("keep", keep, x.size(0), x, keep_held);
      args.rows_per_sample = std::max<int64_t>(1, args.rows / std::max<int64_t>(1, x.size(0)));
    }
    if (residual.has_value()) {
      STD_TORCH_CHECK(residual->numel() == args.rows * width && last(*residual) == width,
                      "residual: expected the output's shape");
      residual_held = contiguous_stream("residual", *residual, x.scalar_type());
      args.residual = residual_held.const_data_ptr();
    }
  }
};

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
  Tensor x, weight, residual, thirds[2], out;
  Held held[3];

  Product(const Tensor& x_in, const Tensor& weight_in, const Optional& bias,
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

  void add_epilogue(const Tensor& like, const Optional& residual_in,
                    const Optional& gamma, const Optional& keep) {
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
