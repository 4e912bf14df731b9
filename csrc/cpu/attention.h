// What the launchers of attention hand to its kernels (attention.inl, attention_bwd.inl).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"

namespace deit {

// Rotary positions (arXiv 2104.09864): a row x of q or k becomes x * cos + turned(x) * sin, where
// `turned` takes every pair (a, b) of channels to (-b, a). The first `prefix` tokens stay.
struct Rope {
  const float* sin;  // null: nothing is rotated
  const float* cos;  // both [N - prefix, d], or one of these for each head
  int64_t stride_head, stride_token;  // of both
  int64_t prefix;
  bool interleaved;  // pairs are channels (2 i, 2 i + 1), else (i, i + d / 2)
};

struct AttentionArgs {
  const void* qkv;  // [B, N, 3 * H * d], last axis contiguous
  void* out;        // [B, N, H * d], contiguous
  const float* key_bias;  // [B, N], contiguous, or null
  float* lse;             // [B, H, N] for training, or null
  Scalar type;            // of qkv and out
  int64_t batch, tokens, heads, head_dim;
  int64_t stride_batch, stride_token;  // of qkv, in elements
  float scale;
  Rope rope;
  bool bf16_products;  // round q, k, v and p to bf16 where the set multiplies that faster; fp32 qkv
  int64_t query_tile;  // queries of one task; `tiles` tasks cover N
  int64_t tiles;
};

struct AttentionGradientArgs {
  const void* qkv;        // [B, N, 3 * H * d], last axis contiguous
  const void* dout;       // [B, N, H * d], last axis contiguous
  void* dqkv;             // [B, N, 3 * H * d]
  const float* key_bias;  // [B, N] or null
  Scalar type;
  int64_t batch, tokens, heads, head_dim;
  int64_t stride_batch, stride_token;            // of qkv
  int64_t dout_stride_batch, dout_stride_token;  // of dout
  float scale;
  Rope rope;
  int64_t query_tile;
};

struct AttentionKernels {
  void (*plan)(AttentionArgs&);  // sets query_tile and tiles
  size_t (*workspace)(const AttentionArgs&);  // floats, one range's
  void (*forward)(const AttentionArgs&, float* workspace, int64_t begin, int64_t end);
  void (*plan_gradient)(AttentionGradientArgs&);  // sets query_tile
  size_t (*gradient_workspace)(const AttentionGradientArgs&);
  void (*gradient)(const AttentionGradientArgs&, float* workspace, int64_t begin,
                   int64_t end);  // of heads
};

}  // namespace deit
