// What a call of `linear` comes to, for each of its kernels: its arguments checked and described.
#pragma once

#include <string>
#include <vector>

#include "call.h"
#include "linear.h"

namespace deit {

inline Activation activation_of(const std::optional<std::string>& name) {
  if (!name.has_value()) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "quick_gelu") return Activation::quick_gelu;
  STD_TORCH_CHECK(*name == "silu",
                  "activation: expected none, gelu, gelu_tanh, quick_gelu or silu; got ", *name);
  return Activation::silu;
}

// What a kernel asks of a matrix beside rows that are evenly spaced.
enum class Wants { any, rows_apart, copy_engine };

// The one distance between all rows of `tensor`, which is copied where there is none, where its
// rows overlap and `wants` forbids that, or where Hopper's copy engine does not take it.
inline int64_t evenly_spaced(Tensor& tensor, Wants wants) {
  const Rows rows = rows_of(tensor);
  const int64_t columns = tensor.size(tensor.dim() - 1);
  const int64_t stride = rows.dims == 1 ? rows.strides[0] : columns;
  const bool apart = wants == Wants::any || stride >= columns;
  const bool whole = wants != Wants::copy_engine ||
                     (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && stride % 8 == 0);
  if (rows.dims <= 1 && apart && whole) return stride;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  tensor = copy;
  return columns;
}

// The arguments, and the tensors that they point into. `args` has no strides and no addresses of
// x, weight, residual and out before `place`.
struct LinearCall {
  LinearArgs args{};
  Scalar type;
  Tensor x, weight, out, bias, gamma, keep;
  std::optional<Tensor> residual;

  LinearCall(const Tensor& given, const Tensor& of, const std::optional<Tensor>& bias_given,
             Activation activation, const std::optional<Tensor>& added,
             const std::optional<Tensor>& scale, const std::optional<Tensor>& kept)
      : x(given), weight(of), residual(added) {
    STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2, "x: rank >= 1; weight: rank 2");
    args.activation = activation;
    args.width = weight.size(0);
    args.depth = weight.size(1);
    STD_TORCH_CHECK(x.size(x.dim() - 1) == args.depth, "weight: expected x's channels");
    type = scalar_of("x", x);
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(),
                    "weight: expected x's dtype and device");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = args.width;
    out = torch::stable::new_empty(residual.has_value() ? *residual : x, shape);
    if (out.numel() == 0) return;
    args.rows = out.numel() / args.width;
    args.rows_per_sample = args.rows / (x.dim() > 1 ? x.size(0) : 1);
    check_counts("linear", args.rows, args.width, args.depth);
    args.bias = bias_of(bias_given, args.width, x, bias);
    args.gamma = values("gamma", scale, args.width, x, gamma);
    args.keep = values("keep", kept, args.rows / args.rows_per_sample, x, keep);
    if (!residual.has_value()) return;
    STD_TORCH_CHECK(same_shape(*residual, out) && residual->device() == x.device(),
                    "residual: expected the output's shape, x's device");
    const bool fp32 = scalar_of("residual", *residual) == Scalar::f32;
    STD_TORCH_CHECK(fp32 || residual->scalar_type() == x.scalar_type(),
                    "residual: expected x's dtype or fp32");
    args.residual = {residual->const_data_ptr(), fp32};
  }

  // Whether there is nothing to compute.
  bool empty() const { return out.numel() == 0; }

  // Matrices with one distance between rows, copied where a kernel could not read them; on the
  // stream that is current.
  void place(Wants wants) {
    if (residual.has_value()) {
      args.residual_stride = evenly_spaced(*residual, wants);
      args.residual.data = residual->const_data_ptr();
    }
    args.x_stride = evenly_spaced(x, wants);
    args.weight_stride = evenly_spaced(weight, wants);
    args.x = x.const_data_ptr();
    args.weight = weight.const_data_ptr();
    args.out = out.mutable_data_ptr();
  }
};

// `tensor` at a multiple of so many bytes, copied where it is not; its address.
inline const void* aligned(Tensor& tensor, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes != 0) {
    Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
    torch::stable::copy_(copy, tensor);
    tensor = copy;
  }
  return tensor.const_data_ptr();
}

// Queues Hopper's own kernel; false where it does not take the call, or the GPU is another.
inline bool queued_on_hopper(LinearCall& linear, const Call& call) {
  LinearArgs& args = linear.args;
  if (!call.hopper || !hopper_takes(args, linear.type)) return false;
  if (args.bias) args.bias = aligned(linear.bias, 4);
  if (args.gamma.data) args.gamma.data = aligned(linear.gamma, 4);
  linear.place(Wants::copy_engine);
  queued("linear", launch_linear_hopper(args, linear.type, call.stream));
  return true;
}

}  // namespace deit
