// Where an operator's kernels are queued: the current stream of its tensors' device, which is made
// current. With DEIT_EMULATED there is no device and tensors are the CPU's.
#pragma once

#include "../common/tensors.h"

#ifdef DEIT_EMULATED
#define DEIT_DEVICE CPU
#else
#include <cuda_runtime.h>
// Stays after the torch headers, which declare the CUDA part of the stable C interface.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#define DEIT_DEVICE CUDA
#endif

#include "epilogue.h"

namespace deit {

#ifdef DEIT_EMULATED
struct Call {
  explicit Call(const Tensor&) {}
  int device = 0;
  void* stream = nullptr;
  bool hopper = false;
};
#else
struct Call {
  explicit Call(const Tensor& x) : guard(x.get_device_index()), device(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    hopper = major == 9 && minor == 0;
  }
  const torch::stable::accelerator::DeviceGuard guard;
  const int device;
  void* stream = nullptr;
  bool hopper = false;
};
#endif

inline void queued(const char* name, const char* error) {
  STD_TORCH_CHECK(error == nullptr, name, ": ", error ? error : "");
}

// An optional vector in x's dtype or in fp32, contiguous; `holder` keeps it.
inline Values values(const char* name, const std::optional<Tensor>& value, int64_t numel,
                     const Tensor& x, Tensor& holder) {
  if (!value.has_value()) return {nullptr, false};
  check_parameter(name, *value, numel, x);
  const ScalarType type = value->scalar_type();
  STD_TORCH_CHECK(type == x.scalar_type() || type == ScalarType::Float, name,
                  ": expected x's dtype or fp32");
  holder = value->is_contiguous() ? *value : torch::stable::contiguous(*value);
  return {holder.const_data_ptr(), type == ScalarType::Float};
}

// An optional vector in x's dtype, contiguous.
inline const void* bias_of(const std::optional<Tensor>& value, int64_t numel, const Tensor& x,
                           Tensor& holder) {
  if (!value.has_value()) return nullptr;
  STD_TORCH_CHECK(value->scalar_type() == x.scalar_type(), "bias: expected x's dtype");
  return values("bias", value, numel, x, holder).data;
}

// Sizes that kernels count in 32 bits.
inline void check_counts(const char* name, int64_t rows, int64_t width, int64_t depth) {
  constexpr int64_t most = INT32_MAX - 1024;  // a tile more is counted
  STD_TORCH_CHECK(rows <= most && width <= most && depth <= most, name,
                  ": expected fewer than 2^31 rows and columns");
}

}  // namespace deit
