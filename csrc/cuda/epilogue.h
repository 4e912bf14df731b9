// What a product's epilogue is told, by launchers and to kernels.
#pragma once

#include <cstdint>

namespace deit {

enum class Activation : int { none, gelu, gelu_tanh, quick_gelu, silu };

// A vector or matrix in the product's type or in fp32; data is null for none.
struct Values {
  const void* data;
  bool fp32;
};

}  // namespace deit
