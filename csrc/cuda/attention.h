// What attention.cpp hands to attention.cu.
#pragma once

#include <cstdint>

#include "../common/rows.h"
#include "epilogue.h"

namespace deit {

// Wider heads have no kernel.
constexpr int64_t kWidestHead = 128;

// softmax(q kT * scale + key_bias) v for every head of the packed projection [B, N, 3, H, d], whose
// last three axes are contiguous.
struct AttentionArgs {
  const void* qkv;
  Values key_bias;  // [B, N], contiguous
  void* out;        // [B, N, H, d], contiguous
  int64_t stride_batch, stride_token;
  int64_t batch, tokens, heads, head_dim;
  float scale;
};

// Queues the kernel on `stream` of the current device; null, or what the driver says against it.
// All sizes are positive, heads at most kWidestHead wide, and B * N * H fits 31 bits.
const char* launch_attention(const AttentionArgs& args, Scalar type, void* stream);

}  // namespace deit
