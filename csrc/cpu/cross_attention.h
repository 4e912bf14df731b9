// What the launcher of cross-attention hands to its kernel (cross_attention.inl).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"

namespace deit {

struct CrossAttentionArgs {
  const void* q;   // [B, R, H * d], last axis contiguous
  const void* kv;  // [B, N, 2 * H * d], last axis contiguous
  void* out;       // [B, R, H * d], contiguous
  Scalar type;     // of all three
  int64_t batch, queries, tokens, heads, head_dim;
  int64_t q_stride_batch, q_stride_token, kv_stride_batch, kv_stride_token;  // in elements
  float scale;
};

struct CrossAttentionKernels {
  size_t (*workspace)(const CrossAttentionArgs&);  // floats, one range's
  void (*forward)(const CrossAttentionArgs&, float* workspace, int64_t begin,
                  int64_t end);  // of queries by head and image: [B, H, R]
};

}  // namespace deit
