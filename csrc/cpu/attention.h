// What the launchers of attention hand to its kernels (attention.inl, attention_bwd.inl).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"

namespace deit {

struct AttentionArgs {
  const void* qkv;  // [B, N, 3 * H * d], last axis contiguous
  void* out;        // [B, N, H * d], contiguous
  const float* key_bias;  // [B, N], contiguous, or null
  float* lse;             // [B, H, N] for training, or null
  Scalar type;            // of qkv and out
  int64_t batch, tokens, heads, head_dim;
  int64_t stride_batch, stride_token;  // of qkv, in elements
  float scale;
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
