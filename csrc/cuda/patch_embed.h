// What patch_embed.cpp hands to patch_embed.cu.
#pragma once

#include <cstdint>

#include "../common/rows.h"

namespace deit {

// out = concat(prefix, patches @ weight.T + bias) + pos_embed, all of one type.
struct PatchEmbedArgs {
  const void* images;     // [batch, channels, down * high, across * wide] at these strides
  const void* weight;     // [width, channels, high, wide], contiguous
  const void* bias;       // [width] or null
  const void* prefix;     // [before, width], contiguous
  const void* pos_embed;  // [before + down * across, width], contiguous
  void* out;              // [batch, before + down * across, width], contiguous
  int64_t strides[4];
  int64_t batch, channels, high, wide, down, across, before, width;
};

// Queues the kernels on `stream` of the current device; null, or what the driver says against it.
// batch, width and a patch's sizes are positive; all products of sizes but an image's fit 31 bits.
const char* launch_patch_embed(const PatchEmbedArgs& args, Scalar type, void* stream);

}  // namespace deit
