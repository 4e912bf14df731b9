// Checks and descriptions of tensors, shared by the CPU's and the CUDA operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "rows.h"

namespace deit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Scalar scalar_of(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  name, ": expected fp32, fp16 or bf16");
  if (type == ScalarType::Half) return Scalar::f16;
  return type == ScalarType::Float ? Scalar::f32 : Scalar::bf16;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

inline Tensor with_contiguous_last_axis(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool already = tensor.size(last) == 1 || tensor.stride(last) == 1;
  return already ? tensor : torch::stable::contiguous(tensor);
}

// Merges the leading axes that memory lets merge. False where more than kMaxLeadingDims remain.
inline bool merge_rows(const Tensor& tensor, Rows& rows) {
  rows.data = tensor.const_data_ptr();
  rows.dims = 0;
  for (int64_t d = 0; d < tensor.dim() - 1; ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    if (rows.dims > 0 && rows.strides[rows.dims - 1] == size * stride) {
      rows.sizes[rows.dims - 1] *= size;
      rows.strides[rows.dims - 1] = stride;
      continue;
    }
    if (rows.dims == kMaxLeadingDims) return false;
    rows.sizes[rows.dims] = size;
    rows.strides[rows.dims++] = stride;
  }
  return true;
}

// `tensor` is replaced by a contiguous copy where its strides cannot be described.
inline Rows rows_of(Tensor& tensor) {
  tensor = with_contiguous_last_axis(tensor);
  Rows rows{};
  if (!merge_rows(tensor, rows)) {
    tensor = torch::stable::contiguous(tensor);
    merge_rows(tensor, rows);
  }
  return rows;
}

inline void check_parameter(const char* name, const Tensor& value, int64_t numel,
                            const Tensor& like) {
  STD_TORCH_CHECK(value.device() == like.device(), name, ": expected on the input's device");
  STD_TORCH_CHECK(value.numel() == numel, name, ": expected ", numel, " elements; got ",
                  value.numel());
}

inline void check_residual(const Tensor& x, const Tensor& residual) {
  STD_TORCH_CHECK(residual.device() == x.device(), "residual: expected on x's device");
  STD_TORCH_CHECK(same_shape(x, residual), "residual: expected x's shape");
  const ScalarType type = residual.scalar_type();
  STD_TORCH_CHECK(type == x.scalar_type() || type == ScalarType::Float,
                  "residual: expected x's dtype or fp32");
}

}  // namespace deit
