// The vector type of one instruction set (csrc/cpu/simd.h) behind plain functions, for
// case_lanes.cpp.
#pragma once

#include <cstdint>

namespace fuzz {

enum class Op { max, min, fma, round, scale_by_power, exp, swap_pairs, multiply_pairs };

struct Lanes {
  const char* name;
  int width;
  bool fused;
  void (*apply)(Op op, const float* a, const float* b, const float* c, float* to);
  void (*first)(const float* a, int n, float* to);
  float (*sum)(const float* a);
  float (*largest)(const float* a);
  void (*transpose)(float* square);  // [width, width], in place
  void (*widen)(bool bf16, const uint16_t* from, float* to);
  void (*narrow)(bool bf16, const float* from, uint16_t* to);
  void (*narrow_two)(bool bf16, const float* from, uint16_t* to);  // of two vectors
};

extern const Lanes portable_lanes;
#if defined(__x86_64__) || defined(_M_X64)
extern const Lanes avx2_lanes;
extern const Lanes avx512_lanes;
extern const Lanes avx512_bf16_lanes;
#elif defined(__aarch64__) && defined(__linux__)
extern const Lanes neon_lanes;
extern const Lanes neon_bf16_lanes;
#endif

}  // namespace fuzz
