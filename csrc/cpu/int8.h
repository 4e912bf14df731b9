// What the launchers (int8_linear.cpp) and the kernels (int8_kernels.cpp, once per instruction set)
// of the products in 8-bit integers share: plain data and function pointers, as in isa.h.
//
// Weights are symmetric, one scale an output channel; activations are u8 with a scale and a zero
// point a token, found as the rows pass. Per row m and channel n
//
//     y = scale_m * scale_n * (sum_k q_mk w_nk  -  zero_m * sum_k w_nk)  +  bias_n
//
// where the bracket is exact in int32: 255 * 127 * depth < 2^31 up to a depth of 66311.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace deit {

constexpr int64_t kPanelColumns = 32;  // output channels of one panel of packed weights
constexpr int64_t kMaxDepth = 65536;

// `packed` is [ceil(features / 32), ceil(depth / 4), 32, 4]: four terms of one channel lie side by
// side, as the dot-product instructions read them. The others have 32 values a panel.
struct Int8Weight {
  const int8_t* packed;
  const int32_t* sums;   // sum_k w_nk
  const float* scales;   // times gamma, where there is one
  const float* bias;     // the same; zeros for none
  int64_t features;
  int64_t depth;
};

// residual + gamma * (second(gelu(first(x)))), or of `first` alone, with or without GELU. x is
// normalised before it is quantised where norm.weight is set.
struct Int8Args {
  Rows x;
  Rows residual;         // data null: none
  LayerNormArgs norm;    // its weight, bias, eps and channels alone
  Int8Weight first;
  Int8Weight second;     // packed null: none
  float* out;            // [rows, features], contiguous
  int64_t rows;
  bool gelu;
};

// Ranges are of groups of `group` rows. A row is computed by the same arithmetic wherever a range
// begins, so results do not depend on the number of threads.
struct Int8Kernels {
  const char* name;
  int64_t group;
  int64_t pass;  // groups of one pass over the weights, at most
  size_t (*workspace)(const Int8Args&);  // bytes, one range's
  void (*run)(const Int8Args&, void* workspace, int64_t begin, int64_t end);
};

extern const Int8Kernels portable_int8;
#if defined(__x86_64__) || defined(_M_X64)
extern const Int8Kernels avx2_int8;
extern const Int8Kernels avxvnni_int8;
extern const Int8Kernels avx512vnni_int8;
#elif defined(__aarch64__) && defined(__linux__)
extern const Int8Kernels neon_int8;
extern const Int8Kernels neon_dotprod_int8;
extern const Int8Kernels neon_i8mm_int8;
#endif

// The best set this processor runs, or the one that was selected.
const Int8Kernels& int8_kernels();

}  // namespace deit
