// `linear` and `gelu_mlp` on CUDA: on Hopper its own kernel (linear_hopper.cu) for what that takes,
// else linear.cu.
#include <string>
#include <vector>

#include "call.h"
#include "linear.h"

namespace deit {
namespace {

using Optional = std::optional<Tensor>;

Activation activation_of(const std::optional<std::string>& name) {
  if (!name.has_value()) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "quick_gelu") return Activation::quick_gelu;
  STD_TORCH_CHECK(*name == "silu",
                  "activation: expected none, gelu, gelu_tanh, quick_gelu or silu; got ", *name);
  return Activation::silu;
}

// `tensor` at a multiple of so many bytes, copied where it is not.
void align(Tensor& tensor, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0) return;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  tensor = copy;
}

// The one distance between all rows of `tensor`, which is copied where there is none; with
// `by_engine` where Hopper's copy engine does not take it, too.
int64_t evenly_spaced(Tensor& tensor, bool by_engine) {
  const Rows rows = rows_of(tensor);
  const int64_t columns = tensor.size(tensor.dim() - 1);
  const int64_t stride = rows.dims == 1 ? rows.strides[0] : columns;
  const bool taken = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && stride % 8 == 0 &&
                     stride >= columns;
  if (rows.dims <= 1 && (taken || !by_engine)) return stride;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  tensor = copy;
  return columns;
}

Tensor run_linear(Tensor x, Tensor weight, const Optional& bias, Activation activation,
                  const Optional& residual, const Optional& gamma, const Optional& keep) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2, "x: rank >= 1; weight: rank 2");
  LinearArgs args{};
  args.activation = activation;
  args.width = weight.size(0);
  args.depth = weight.size(1);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == args.depth, "weight: expected x's channels");
  const Scalar type = scalar_of("x", x);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(),
                  "weight: expected x's dtype and device");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = args.width;
  Tensor out = residual.has_value() ? torch::stable::new_empty(*residual, shape)
                                    : torch::stable::new_empty(x, shape);
  if (out.numel() == 0) return out;
  args.rows = out.numel() / args.width;
  args.rows_per_sample = args.rows / (x.dim() > 1 ? x.size(0) : 1);
  check_counts("linear", args.rows, args.width, args.depth);
  Tensor held[3], added;
  args.bias = bias_of(bias, args.width, x, held[0]);
  args.gamma = values("gamma", gamma, args.width, x, held[1]);
  args.keep = values("keep", keep, args.rows / args.rows_per_sample, x, held[2]);
  if (residual.has_value()) {
    added = *residual;
    STD_TORCH_CHECK(same_shape(added, out) && added.device() == x.device(),
                    "residual: expected the output's shape, x's device");
    const bool fp32 = scalar_of("residual", added) == Scalar::f32;
    STD_TORCH_CHECK(fp32 || added.scalar_type() == x.scalar_type(),
                    "residual: expected x's dtype or fp32");
    args.residual = {added.const_data_ptr(), fp32};
  }
  const Call call(x);
  const bool hopper = call.hopper && hopper_takes(args, type);
  if (hopper && args.bias) align(held[0], 4), args.bias = held[0].const_data_ptr();
  if (hopper && args.gamma.data) align(held[1], 4), args.gamma.data = held[1].const_data_ptr();
  if (residual.has_value()) {
    args.residual_stride = evenly_spaced(added, hopper);
    args.residual.data = added.const_data_ptr();
  }
  args.x_stride = evenly_spaced(x, hopper);
  args.weight_stride = evenly_spaced(weight, hopper);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const auto launch = hopper ? launch_linear_hopper : launch_linear;
  queued("linear", launch(args, type, call.stream));
  return out;
}

Tensor linear(Tensor x, Tensor weight, Optional bias, std::optional<std::string> activation,
              Optional residual, Optional gamma, Optional keep) {
  return run_linear(x, weight, bias, activation_of(activation), residual, gamma, keep);
}

Tensor gelu_mlp(Tensor x, Tensor w1, Optional b1, Tensor w2, Optional b2, Optional residual,
                Optional gamma, Optional keep, std::optional<std::string> activation) {
  const Activation kind = activation.has_value() ? activation_of(activation) : Activation::gelu;
  const Tensor hidden = run_linear(x, w1, b1, kind, {}, {}, {});
  return run_linear(hidden, w2, b2, Activation::none, residual, gamma, keep);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cuda, DEIT_DEVICE, m) {
  m.impl("linear", TORCH_BOX(&deit::linear));
  m.impl("gelu_mlp", TORCH_BOX(&deit::gelu_mlp));
}
