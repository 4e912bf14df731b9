// What linear.cpp and linear_cublaslt.cpp hand to linear.cu, linear_hopper.cu and linear_finish.cu.
#pragma once

#include <cstdint>

#include "../common/rows.h"
#include "epilogue.h"

namespace deit {

// out = residual + keep * gamma * act(x @ weight.T + bias), of one type but for the vectors and the
// residual that say fp32; out is of the residual's type. Rows are contiguous in their last axis.
struct LinearArgs {
  const void* x;         // [rows, depth], x_stride numbers apart
  const void* weight;    // [width, depth], weight_stride numbers apart
  const void* bias;      // [width] or null
  Values gamma;          // [width]
  Values keep;           // [rows / rows_per_sample]
  Values residual;       // [rows, width], residual_stride numbers apart
  void* out;             // [rows, width], contiguous
  int64_t rows, width, depth, rows_per_sample;
  int64_t x_stride, weight_stride, residual_stride;
  Activation activation;
};

// Queues the kernel on `stream` of the current device; null, or what the driver says against it.
// `rows`, `width` and `depth` fit 31 bits; rows and width are positive.
const char* launch_linear(const LinearArgs& args, Scalar type, void* stream);

// Whether Hopper's kernel takes them: half precision, all of one type, GELU or no activation, no
// `keep`, chunks of 8 numbers at multiples of 16 bytes.
bool hopper_takes(const LinearArgs& args, Scalar type);

// The same on a device of compute capability 9.0 for what `hopper_takes`.
const char* launch_linear_hopper(const LinearArgs& args, Scalar type, void* stream);

// out = residual + keep * gamma * act(out) of a product that lies in `out` already, its bias added;
// the rest as launch_linear.
const char* launch_finish(const LinearArgs& args, Scalar type, void* stream);

}  // namespace deit
