// Plain data that launchers and kernels, on the CPU and on CUDA, describe tensors with.
#pragma once

#include <cstdint>

namespace deit {

enum class Scalar : int { f32, f16, bf16 };

constexpr int kMaxLeadingDims = 4;

// The rows of a tensor [..., D] whose last axis is contiguous. Sizes and strides (in elements)
// are those of the leading axes, adjacent ones merged where memory allows.
struct Rows {
  const void* data;
  int dims;
  int64_t sizes[kMaxLeadingDims];
  int64_t strides[kMaxLeadingDims];
};

}  // namespace deit
