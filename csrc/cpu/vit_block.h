// What the launcher of a whole block hands to its kernel (vit_block.inl).
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "layer_norm.h"
#include "linear.h"

namespace deit {

// A pre-norm block in inference, an image after another: everything between x and out stays in the
// thread's workspace. What differs from image to image is null here.
struct BlockArgs {
  const void* x;          // [images, tokens, channels], contiguous
  void* out;              // the same
  float* row_stats;       // [images, tokens, 2, ceil(channels / 64)]
  LayerNormArgs norm[2];  // weight, bias, eps and channels
  ProductArgs qkv, proj, fc1, fc2;  // all of one type; packed, and planned for an image by one thread
  AttentionArgs attention;          // of one image, planned
};

struct BlockKernels {
  size_t (*workspace)(const BlockArgs&);  // floats, one range's
  void (*run)(const BlockArgs&, float* workspace, int64_t begin, int64_t end);  // of images
  // Rows [begin, end) of x [rows, channels] -> [rows, 2, ceil(channels / 64)]: of every 64 columns
  // the mean and the sum of squares about it.
  void (*row_stats)(const void* x, Scalar type, int64_t channels, float* stats, int64_t begin,
                    int64_t end);
};

}  // namespace deit
