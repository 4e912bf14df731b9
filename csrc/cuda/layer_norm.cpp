// LayerNorm on CUDA, alone or after a residual addition: checks, outputs, and the launch on the
// current stream of the input's device. Asking for that stream needs libtorch_cuda, which is why
// this is a library of its own.
#include <cuda_runtime.h>

#include "../common/tensors.h"
// Stays after the torch headers, which declare the CUDA part of the stable C interface.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "layer_norm.h"

namespace deit {
namespace {

Parameter parameter(const char* name, const std::optional<Tensor>& value, int64_t numel,
                    const Tensor& x, Tensor& holder) {
  if (!value.has_value()) return {nullptr, false};
  check_parameter(name, *value, numel, x);
  const ScalarType type = value->scalar_type();
  STD_TORCH_CHECK(type == x.scalar_type() || type == ScalarType::Float, name,
                  ": expected x's dtype or fp32");
  holder = value->is_contiguous() ? *value : torch::stable::contiguous(*value);
  return {holder.const_data_ptr(), type == ScalarType::Float};
}

void run(const LayerNormArgs& args, Scalar residual_type, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  launch_layer_norm(args, scalar_of("x", x), residual_type, static_cast<cudaStream_t>(stream));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor layer_norm(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  LayerNormArgs args{};
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor held[2];
  args.weight = parameter("weight", weight, args.channels, x, held[0]);
  args.bias = parameter("bias", bias, args.channels, x, held[1]);
  const Scalar type = scalar_of("x", x);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (out.numel() == 0) return out;
  args.rows = out.numel() / args.channels;
  args.x = rows_of(x);
  args.out = out.mutable_data_ptr();
  run(args, type, x);
  return out;
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, Tensor residual, Tensor weight,
                                          std::optional<Tensor> bias, double eps,
                                          std::optional<Tensor> gamma,
                                          std::optional<Tensor> keep) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  scalar_of("x", x);
  check_residual(x, residual);
  LayerNormArgs args{};
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor held[4];
  args.weight = parameter("weight", weight, args.channels, x, held[0]);
  args.bias = parameter("bias", bias, args.channels, x, held[1]);
  args.gamma = parameter("gamma", gamma, args.channels, x, held[2]);
  args.keep = parameter("keep", keep, x.size(0), x, held[3]);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  Tensor sum = torch::stable::new_empty(residual, residual.sizes());
  if (out.numel() > 0) {
    args.rows = out.numel() / args.channels;
    args.rows_per_sample = args.rows / x.size(0);
    args.x = rows_of(x);
    args.residual = rows_of(residual);
    args.out = out.mutable_data_ptr();
    args.sum = sum.mutable_data_ptr();
    run(args, scalar_of("residual", residual), x);
  }
  return {out, sum};
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cuda, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&deit::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&deit::add_layer_norm));
}
