// What layer_norm.cpp hands to layer_norm.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/rows.h"

namespace deit {

// A vector [n] in x's dtype or in fp32; data is null for none.
struct Parameter {
  const void* data;
  bool fp32;
};

// LN(residual + keep * gamma * x), and LN(x) where `residual.data` is null.
struct LayerNormArgs {
  Rows x;
  Rows residual;
  Parameter weight, bias, gamma;  // [D], contiguous
  Parameter keep;                 // [rows / rows_per_sample], contiguous
  void* out;                      // [rows, D], contiguous, x's type
  void* sum;                      // [rows, D], contiguous, residual's type
  int64_t rows;
  int64_t rows_per_sample;
  int64_t channels;
  float eps;
};

// Queues the kernel for these dtypes (residual: x's or fp32) on `stream`; the caller checks
// cudaGetLastError. `rows` and `channels` are positive.
void launch_layer_norm(const LayerNormArgs& args, Scalar x_type, Scalar residual_type,
                       cudaStream_t stream);

}  // namespace deit
