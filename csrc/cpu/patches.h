// Images as a patch embedding reads them: every patch a row of channels x height x width inputs.
#pragma once

#include <cstdint>

namespace deit {

struct Images {
  const void* data;
  int64_t channels, height, width;  // of a patch
  int64_t across, patches;          // patches in a row of the grid, and in an image
  int64_t strides[4];               // of [B, C, H, W], in elements
};

}  // namespace deit
