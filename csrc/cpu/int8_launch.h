// Products in 8-bit integers as their launchers describe them (int8_linear.cpp,
// int8_vit_block.cpp).
#pragma once

#include <algorithm>

#include "int8.h"
#include "launch.h"

namespace deit {

// Multiply-adds below which another thread costs more than it saves: PyTorch's own figure is of
// elements, read and written, and a vector instruction does 64 of these.
constexpr int64_t kInt8Grain = 32 * kGrain;

inline size_t floats_of(size_t bytes) { return (bytes + sizeof(float) - 1) / sizeof(float); }

inline const float* fp32_vector(const char* name, const Optional& value,
                                int64_t numel, const Tensor& like, Tensor& holder) {
  if (!value.has_value()) return nullptr;
  check_parameter(name, *value, numel, like);
  STD_TORCH_CHECK(value->scalar_type() == ScalarType::Float, name, ": expected fp32");
  holder = value->is_contiguous() ? *value : torch::stable::contiguous(*value);
  return static_cast<const float*>(holder.const_data_ptr());
}

// A weight as the kernels read it. `columns` holds its scales and biases, times gamma, with zeros
// up to a whole panel; the tensors given must outlive it.
inline Int8Weight weight_of(const Tensor& x, int64_t depth, const Tensor& packed,
                            const Tensor& scales,
                            const Tensor& sums, const Optional& bias,
                            const Optional& gamma, Buffer& columns) {
  Int8Weight weight{};
  weight.features = scales.numel();
  weight.depth = depth;
  const int64_t panels = (weight.features + kPanelColumns - 1) / kPanelColumns;
  STD_TORCH_CHECK(depth >= 1 && depth <= kMaxDepth, "x: expected 1 to ", kMaxDepth,
                  " channels; got ", depth);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Char && packed.is_contiguous() &&
                      packed.numel() == panels * kPanelColumns * ((depth + 3) / 4 * 4),
                  "packed: expected contiguous int8 of [", panels, ", ", (depth + 3) / 4,
                  ", 32, 4], as int8.h describes it");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Int && sums.is_contiguous() &&
                      sums.numel() == panels * kPanelColumns,
                  "sums: expected contiguous int32 of [", panels * kPanelColumns, "]");
  check_parameter("packed", packed, packed.numel(), x);
  check_parameter("sums", sums, sums.numel(), x);
  weight.packed = static_cast<const int8_t*>(packed.const_data_ptr());
  weight.sums = static_cast<const int32_t*>(sums.const_data_ptr());
  Tensor held[3];
  const float* scale = fp32_vector("scales", scales, weight.features, x, held[0]);
  const float* shift = fp32_vector("bias", bias, weight.features, x, held[1]);
  const float* factor = fp32_vector("gamma", gamma, weight.features, x, held[2]);
  const int64_t padded = panels * kPanelColumns;
  columns = allocate(static_cast<size_t>(2 * padded));
  float* folded = columns.get();
  std::fill(folded, folded + 2 * padded, 0.0f);
  for (int64_t n = 0; n < weight.features; ++n) {
    const float times = factor ? factor[n] : 1.0f;
    folded[n] = scale[n] * times;
    folded[padded + n] = shift ? shift[n] * times : 0.0f;
  }
  weight.scales = folded;
  weight.bias = folded + padded;
  return weight;
}

// A product over all threads.
inline void run_int8(const Int8Args& args) {
  const Int8Kernels& set = int8_kernels();
  const int64_t work = set.group * (args.first.features * args.first.depth +
                                    args.second.features * args.second.depth);
  const int64_t groups = (args.rows + set.group - 1) / set.group;
  const size_t floats = floats_of(set.workspace(args));
  over_threads(groups, std::max<int64_t>(1, kInt8Grain / work), floats,
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.run(args, workspace, begin, end);
               }, set.pass);
}

}  // namespace deit
