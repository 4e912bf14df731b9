// Numbers in half precision as a GPU converts them: to nearest, halves to even, denormal ones kept.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace deit {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

namespace gpu {

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float size = std::bit_cast<float>(rest << 13) * 0x1p112f;  // denormal numbers, too
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(size));
}

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline f16 narrow<f16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), rest = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (x != x) return {0x7fff};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and on
  uint32_t half;
  if (rest < 0x38800000u) {  // below 2^-14; the units of 0.5 are 2^-24
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

template <class T>
inline uint32_t pack(float first, float second) {
  return narrow<T>(first).bits | static_cast<uint32_t>(narrow<T>(second).bits) << 16;
}

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float positive(float x) { return x < 0.0f ? 0.0f : x; }

}  // namespace gpu
}  // namespace deit
