// One vector type per instruction set, fp32 lanes: what the kernels are written in.
//
// kernels.cpp is compiled once per instruction set with its own flags and DEIT_ISA; everything
// here lives in a namespace of that name, so no two copies can meet in the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(DEIT_NEON)
#include <arm_neon.h>
#endif

#define DEIT_INLINE inline __attribute__((always_inline))

// setup.py defines DEIT_NEON for the sets of an Arm processor; its portable set has NEON, too.
#if defined(DEIT_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DEIT_BFMMLA
#endif
// The sets that multiply pairs of bf16 faster than fp32.
#if defined(__AVX512BF16__) || defined(DEIT_BFMMLA)
#define DEIT_BF16_PRODUCTS
#endif

namespace deit {
namespace DEIT_ISA {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kWidth = 16;
constexpr bool kFused = true;  // `fma` rounds once

DEIT_INLINE Vec broadcast(float a) { return _mm512_set1_ps(a); }
DEIT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
DEIT_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
DEIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Both give `b` where either is NaN: put the value that may be NaN second.
DEIT_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
DEIT_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
DEIT_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, 0x08); }
DEIT_INLINE Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
DEIT_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a); }
DEIT_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a); }
DEIT_INLINE Vec first(Vec a, int n) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1u), a);
}
// Neighbours change places: lanes 1, 0, 3, 2, ...
DEIT_INLINE Vec swap_pairs(Vec a) { return _mm512_permute_ps(a, 0xb1); }

DEIT_INLINE Vec load(const BF16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
DEIT_INLINE Vec load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Rounded to the nearest bf16, which is the upper half of each word; a NaN stays one.
DEIT_INLINE __m512i rounded_to_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  // Class by class: quiet and signalling NaN give the quiet NaN of `a`, all else `nearest`.
  return _mm512_castps_si512(_mm512_fixupimm_ps(_mm512_castsi512_ps(nearest), a,
                                                _mm512_set1_epi32(0x22), 0));
}
DEIT_INLINE void store(BF16* p, Vec a) {
  const __m512i top = _mm512_srli_epi32(rounded_to_bf16(a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
}
DEIT_INLINE void store_two(BF16* p, Vec a, Vec b) {
  const __m512i lane = _mm512_set_epi32(0x003f003d, 0x003b0039, 0x00370035, 0x00330031, 0x002f002d,
                                        0x002b0029, 0x00270025, 0x00230021, 0x001f001d, 0x001b0019,
                                        0x00170015, 0x00130011, 0x000f000d, 0x000b0009, 0x00070005,
                                        0x00030001);
  const __m512i halves = _mm512_permutex2var_epi16(rounded_to_bf16(a), lane, rounded_to_bf16(b));
  _mm512_storeu_si512(p, halves);
}
DEIT_INLINE void store(F16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, 0));
}

// The processor's own where the unit is compiled for it; its sums are rounded to nearest.
DEIT_INLINE Vec multiply_pairs(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  c = fma(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
          _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), c);
  return fma(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
             _mm512_castsi512_ps(_mm512_and_si512(y, high)), c);
#endif
}

// Words of the columns of two rows, `low`'s in their lower halves.
DEIT_INLINE Vec load_pairs(const BF16* low, const BF16* high) {
  const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  const __m512i top = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(even), top));
}

#if defined(__AVX512BF16__)
// Words of two bf16 each. `narrowed` pairs neighbours in (low, high), taken as one row of 32.
// `interleaved` pairs the lanes of `low` with those of `high`.
DEIT_INLINE Vec narrowed(Vec low, Vec high) { return (Vec)_mm512_cvtne2ps_pbh(high, low); }
DEIT_INLINE Vec interleaved(Vec low, Vec high) {
  const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
  const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  return _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}
#endif

// Rows become columns: 16 x 16 in four rounds of shuffles.
DEIT_INLINE void transpose(Vec (&r)[16]) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]);
      const __m512d b = _mm512_castps_pd(t[i + 2 + j]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_f32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd);
  }
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kWidth = 8;
constexpr bool kFused = true;

DEIT_INLINE Vec broadcast(float a) { return _mm256_set1_ps(a); }
DEIT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
DEIT_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
DEIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
DEIT_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
DEIT_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
DEIT_INLINE Vec round(Vec a) { return _mm256_round_ps(a, 0x08); }
DEIT_INLINE Vec power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two factors, so that results below 2^-126 round to denormals rather than to garbage.
DEIT_INLINE Vec scale_by_power(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return a * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
}
DEIT_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
DEIT_INLINE float largest(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
DEIT_INLINE Vec first(Vec a, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
DEIT_INLINE Vec swap_pairs(Vec a) { return _mm256_permute_ps(a, 0xb1); }

DEIT_INLINE Vec load(const BF16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
DEIT_INLINE Vec load(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Rounded to the nearest bf16, in the lower half of each word; a NaN stays one.
DEIT_INLINE __m256i rounded_to_bf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(nearest, 16), _mm256_set1_epi32(0x7fc0), nan);
}
DEIT_INLINE void store(BF16* p, Vec a) {
  const __m256i top = rounded_to_bf16(a);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
DEIT_INLINE void store_two(BF16* p, Vec a, Vec b) {
  const __m256i mixed = _mm256_packus_epi32(rounded_to_bf16(a), rounded_to_bf16(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
DEIT_INLINE void store(F16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, 0));
}

DEIT_INLINE Vec multiply_pairs(Vec a, Vec b, Vec c) {
  const __m256i x = _mm256_castps_si256(a), y = _mm256_castps_si256(b);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  c = fma(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), c);
  return fma(_mm256_castsi256_ps(_mm256_and_si256(x, high)),
             _mm256_castsi256_ps(_mm256_and_si256(y, high)), c);
}

DEIT_INLINE Vec load_pairs(const BF16* low, const BF16* high) {
  const __m128i even = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  const __m128i odd = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
  const __m256i top = _mm256_slli_epi32(_mm256_cvtepu16_epi32(odd), 16);
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_cvtepu16_epi32(even), top));
}

DEIT_INLINE void transpose(Vec (&r)[8]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
  for (int j = 0; j < 8; ++j) r[j] = t[j];
}

#elif defined(DEIT_NEON)

#include "simd_neon.inl"

#else  // Any processor: the compiler's own vectors, four lanes (SSE2, NEON).

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr bool kFused = false;

DEIT_INLINE Vec broadcast(float a) { return Vec{a, a, a, a}; }
DEIT_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
DEIT_INLINE void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
DEIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
DEIT_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
DEIT_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
// Adding 1.5 * 2^23 leaves no bits for a fraction; exact for |a| < 2^22.
DEIT_INLINE Vec round(Vec a) {
  const Vec magic = broadcast(12582912.0f);
#if defined(__FP_FAST_FMAF)  // or a product would be added to `magic` before it is rounded
  __asm__("" : "+m"(a));
#endif
  Vec shifted = a + magic;
  __asm__("" : "+m"(shifted));  // or the pair of additions is folded away under fast contraction
  return shifted - magic;
}
DEIT_INLINE Vec power_of_two(IntVec n) { return reinterpret_cast<Vec>((n + 127) << 23); }
DEIT_INLINE Vec scale_by_power(Vec a, Vec n) {
  IntVec whole;
  for (int i = 0; i < kWidth; ++i) whole[i] = n[i] == n[i] ? static_cast<int32_t>(n[i]) : 0;
  const IntVec half = whole >> 1;
  return a * power_of_two(half) * power_of_two(whole - half);
}
DEIT_INLINE float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
DEIT_INLINE float largest(Vec a) {
  const float low = a[0] > a[1] ? a[0] : a[1];
  const float high = a[2] > a[3] ? a[2] : a[3];
  return low > high ? low : high;
}
DEIT_INLINE Vec first(Vec a, int n) {
  for (int i = n; i < kWidth; ++i) a[i] = 0.0f;
  return a;
}
DEIT_INLINE Vec swap_pairs(Vec a) { return Vec{a[1], a[0], a[3], a[2]}; }

DEIT_INLINE uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
DEIT_INLINE float float_of(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
DEIT_INLINE float widen(BF16 a) { return float_of(static_cast<uint32_t>(a.bits) << 16); }
DEIT_INLINE float widen(F16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16;
  const uint32_t magnitude = a.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 rebases the exponent, and makes a denormal half a normal float, exactly.
  const float value = float_of(magnitude << 13) * 5192296858534827628530496329220096.0f;
  return float_of(sign | bits_of(value));
}
DEIT_INLINE BF16 narrow(float a, const BF16*) {
  const uint32_t bits = bits_of(a);
  if (a != a) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
DEIT_INLINE F16 narrow(float a, const F16*) {
  const uint32_t bits = bits_of(a);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds to a multiple of 2^-24
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t nearest = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((nearest - 0x38000000u) >> 13))};
}
template <class T>
DEIT_INLINE Vec load(const T* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
DEIT_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < kWidth; ++i) p[i] = narrow(a[i], p);
}

DEIT_INLINE Vec multiply_pairs(Vec a, Vec b, Vec c) {
  const IntVec x = reinterpret_cast<IntVec>(a), y = reinterpret_cast<IntVec>(b);
  const int32_t high = static_cast<int32_t>(0xffff0000u);
  c = fma(reinterpret_cast<Vec>(x << 16), reinterpret_cast<Vec>(y << 16), c);
  return fma(reinterpret_cast<Vec>(x & high), reinterpret_cast<Vec>(y & high), c);
}

DEIT_INLINE Vec load_pairs(const BF16* low, const BF16* high) {
  Vec words;
  for (int i = 0; i < kWidth; ++i) {
    words[i] = float_of(low[i].bits | static_cast<uint32_t>(high[i].bits) << 16);
  }
  return words;
}

DEIT_INLINE void transpose(Vec (&r)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = i + 1; j < 4; ++j) {
      const float a = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = a;
    }
  }
}

#endif

// Neighbours: at p, and kWidth further on. Some sets have it cheaper for bf16.
template <class T>
DEIT_INLINE void store_two(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kWidth, b);
}

// The same where denormals may become zeros, as the processor's own rounding to bf16 makes them.
template <class T>
DEIT_INLINE void round_two(T* p, Vec a, Vec b) {
  store_two(p, a, b);
}
#if defined(__AVX512BF16__)
template <>
DEIT_INLINE void round_two(BF16* p, Vec a, Vec b) {
  _mm512_storeu_ps(p, narrowed(a, b));
}
#endif

// The first n < kWidth lanes, zeros in the others; memory past them is not touched.
template <class T>
DEIT_INLINE Vec load_first(const T* p, int n) {
  T lanes[kWidth] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <class T>
DEIT_INLINE void store_first(T* p, Vec a, int n) {
  T lanes[kWidth];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// Elements of a word: an fp32, or a pair of bf16.
template <class T>
constexpr int64_t kInWord = static_cast<int64_t>(sizeof(float) / sizeof(T));

// c + a * b of what two words hold: an fp32 each, or a pair of bf16 whose two products are added.
template <class T>
DEIT_INLINE Vec multiply_word(Vec a, Vec b, Vec c) {
  return fma(a, b, c);
}
template <>
DEIT_INLINE Vec multiply_word<BF16>(Vec a, Vec b, Vec c) {
  return multiply_pairs(a, b, c);
}

// e^x for x <= 0, within 1 ulp above 2^-126, 0 at -inf, NaN at NaN. x = n ln 2 + r with
// |r| <= ln 2 / 2, and e^r a polynomial of the least maximal relative error, 3.6e-9, that begins
// as the series does, 1 + r + r^2 / 2 (the series itself needs r^7 for 5e-9).
DEIT_INLINE Vec exp_nonpositive(Vec x) {
  x = max(broadcast(-104.0f), x);  // e^-104 rounds to 0 in fp32
  const Vec n = round(x * broadcast(1.44269504f));
  Vec r = fma(n, broadcast(-0.693359375f), x);     // ln 2 in two parts: the first has 9 bits,
  r = fma(n, broadcast(2.12194440e-4f), r);        // so n times it is exact
  Vec y = broadcast(0.0013863762f);
  y = fma(y, r, broadcast(0.00836751f));
  y = fma(y, r, broadcast(0.041667238f));
  y = fma(y, r, broadcast(0.16666533f));
  y = fma(y, r, broadcast(0.5f));
  y = fma(y, r, broadcast(1.0f));
  y = fma(y, r, broadcast(1.0f));
  return scale_by_power(y, n);
}

}  // namespace DEIT_ISA
}  // namespace deit
