// What layer_norm.cpp hands to layer_norm.cu.
#pragma once

#include <cstdint>

#include "../common/rows.h"
#include "epilogue.h"

namespace deit {

// LN(residual + keep * gamma * x), and LN(x) where `residual.data` is null.
struct LayerNormArgs {
  Rows x;
  Rows residual;
  Values weight, bias, gamma;  // [D], contiguous
  Values keep;                 // [rows / rows_per_sample], contiguous
  void* out;                      // [rows, D], contiguous, x's type
  void* sum;                      // [rows, D], contiguous, residual's type
  int64_t rows;
  int64_t rows_per_sample;
  int64_t channels;
  float eps;
};

// Queues the kernel for these dtypes (residual: x's or fp32) on `stream` of the current device; null,
// or what the driver says against it. `rows` and `channels` are positive.
const char* launch_layer_norm(const LayerNormArgs& args, Scalar x_type, Scalar residual_type,
                              void* stream);

}  // namespace deit
