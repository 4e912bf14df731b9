// `linear` and `gelu_mlp` on CUDA: Hopper's kernel (linear.cu) on the current stream of the input's
// device. Dispatch has already refused the calls that it cannot take.
#include <cuda_runtime.h>

#include "../common/tensors.h"
// Stays after the torch headers, which declare the CUDA part of the stable C interface.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <string>

#include "linear.h"

namespace deit {
namespace {

using Optional = std::optional<Tensor>;

Activation activation_of(const std::optional<std::string>& name) {
  if (!name.has_value()) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(*name == "gelu_tanh", "activation: expected none, gelu or gelu_tanh; got ",
                  *name);
  return Activation::gelu_tanh;
}

bool copies_take(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

// The one distance between all rows of `tensor`, which is copied where there is none that the
// copy engine takes.
int64_t evenly_spaced(Tensor& tensor) {
  const Rows rows = rows_of(tensor);
  const int64_t columns = tensor.size(tensor.dim() - 1);
  const int64_t stride = rows.dims == 1 ? rows.strides[0] : columns;
  if (rows.dims <= 1 && stride >= columns && copies_take(rows.data, stride)) return stride;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  tensor = copy;
  return columns;
}

const void* vector(const char* name, const Optional& value, int64_t numel, const Tensor& x,
                   Tensor& holder) {
  if (!value.has_value()) return nullptr;
  check_parameter(name, *value, numel, x);
  STD_TORCH_CHECK(value->scalar_type() == x.scalar_type(), name, ": expected x's dtype");
  holder = value->is_contiguous() ? *value : torch::stable::contiguous(*value);
  if (reinterpret_cast<uintptr_t>(holder.const_data_ptr()) % 4 != 0) {  // pairs are loaded
    Tensor copy = torch::stable::new_empty(holder, holder.sizes());
    torch::stable::copy_(copy, holder);
    holder = copy;
  }
  return holder.const_data_ptr();
}

Tensor run_linear(Tensor x, Tensor weight, const Optional& bias, Activation activation,
                  const Optional& residual, const Optional& gamma, const Optional& keep) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2, "x: rank >= 1; weight: rank 2");
  STD_TORCH_CHECK(!keep.has_value(), "keep: expected none");
  LinearArgs args{};
  args.activation = activation;
  args.width = weight.size(0);
  args.depth = weight.size(1);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == args.depth, "weight: expected x's channels");
  const Scalar type = scalar_of("x", x);
  STD_TORCH_CHECK(type != Scalar::f32 && weight.scalar_type() == x.scalar_type(),
                  "x, weight: expected one half-precision dtype");
  STD_TORCH_CHECK(args.width % 8 == 0 && args.depth % 8 == 0,
                  "weight: expected multiples of 8 rows and columns");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = args.width;
  Tensor out = torch::stable::new_empty(x, shape);
  if (out.numel() == 0) return out;
  STD_TORCH_CHECK(args.depth > 0, "weight: expected columns");
  args.rows = out.numel() / args.width;
  Tensor held[2], added;
  args.bias = vector("bias", bias, args.width, x, held[0]);
  args.gamma = vector("gamma", gamma, args.width, x, held[1]);
  if (residual.has_value()) {
    added = *residual;
    STD_TORCH_CHECK(same_shape(added, out) && added.scalar_type() == x.scalar_type() &&
                        added.device() == x.device(),
                    "residual: expected the output's shape, x's dtype and device");
    args.residual_stride = evenly_spaced(added);
    args.residual = added.const_data_ptr();
  }
  args.x_stride = evenly_spaced(x);
  args.weight_stride = evenly_spaced(weight);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const cudaError_t error = launch_linear(args, type, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "linear: ", cudaGetErrorString(error));
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

STABLE_TORCH_LIBRARY_IMPL(deit_cuda, CUDA, m) {
  m.impl("linear", TORCH_BOX(&deit::linear));
  m.impl("gelu_mlp", TORCH_BOX(&deit::gelu_mlp));
}
