// What linear.cpp hands to linear.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/rows.h"

namespace deit {

enum class Activation : int { none, gelu, gelu_tanh };

// out = residual + gamma * act(x @ weight.T + bias), all of one half-precision type, rows
// contiguous in their last axis and a multiple of 16 bytes apart from a multiple of 16 bytes on.
struct LinearArgs {
  const void* x;         // [rows, depth], x_stride elements apart
  const void* weight;    // [width, depth], weight_stride elements apart
  const void* bias;      // [width] or null
  const void* gamma;     // [width] or null
  const void* residual;  // [rows, width], residual_stride elements apart, or null
  void* out;             // [rows, width], contiguous
  int64_t rows, width, depth;
  int64_t x_stride, weight_stride, residual_stride;
  Activation activation;
};

// Queues the kernel on `stream` of the current device, of compute capability 9.0; an error of
// the driver's comes back. `rows`, `width` and `depth` are positive and fit 31 bits.
cudaError_t launch_linear(const LinearArgs& args, Scalar type, cudaStream_t stream);

}  // namespace deit
