// Vectors of int32 and the dot product of 8-bit factors, per instruction set; beside simd.h.
//
// With AVX2 alone factors are multiplied as 16-bit words (kWords), two terms an instruction. On the
// units of a Zen that is 1.6 times fp32's multiply-adds; four bytes at a time, exactly, took eight
// instructions for 32 terms and ran at 0.93 of fp32's.
#pragma once

#include "simd.h"

#if defined(DEIT_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
#define DEIT_SMMLA
#elif defined(DEIT_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define DEIT_SDOT
#endif

namespace deit {
namespace DEIT_ISA {

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr bool kWords = true;
using Factor = int16_t;         // of a weight, as a tile reads it
using UnsignedFactor = int16_t;  // of an activation: 0..255
#else
constexpr bool kWords = false;
using Factor = int8_t;
using UnsignedFactor = uint8_t;
#endif
constexpr int kTerms = 4 / static_cast<int>(sizeof(Factor));  // of one lane of `dot`
// Units that multiply signed bytes alone take an activation less this, as bytes whose top bit is
// flipped, and its zero point less this. The sums are the same integers.
#if defined(DEIT_NEON)
constexpr int32_t kOffset = 128;
#else
constexpr int32_t kOffset = 0;
#endif

#if defined(__AVX512VNNI__)

using Ints = __m512i;
DEIT_INLINE Ints broadcast_ints(int32_t a) { return _mm512_set1_epi32(a); }
DEIT_INLINE Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
DEIT_INLINE Ints load_factors(const int8_t* p) { return _mm512_loadu_si512(p); }
DEIT_INLINE Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
DEIT_INLINE Vec to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
// c + the sum of four products in each lane, u8 times s8, exact.
DEIT_INLINE Ints dot(Ints c, Ints unsigned_bytes, Ints signed_bytes) {
  return _mm512_dpbusd_epi32(c, unsigned_bytes, signed_bytes);
}
// round(a) + zero, halves to even, saturated at 255.
DEIT_INLINE void store_factors(uint8_t* p, Vec a, int32_t zero) {
  const Ints q = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(zero));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(q));
}

#elif defined(__AVX2__)

using Ints = __m256i;
DEIT_INLINE Ints broadcast_ints(int32_t a) { return _mm256_set1_epi32(a); }
DEIT_INLINE Ints load_ints(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
DEIT_INLINE Ints load_factors(const Factor* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
DEIT_INLINE Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
DEIT_INLINE Vec to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
DEIT_INLINE Ints dot(Ints c, Ints activations, Ints weights) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(c, activations, weights);
#else
  return _mm256_add_epi32(c, _mm256_madd_epi16(activations, weights));
#endif
}
DEIT_INLINE void store_factors(UnsignedFactor* p, Vec a, int32_t zero) {
  const Ints q = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(zero));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
#if defined(__AVXVNNI__)
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  const __m128i most = _mm_set1_epi16(255);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_min_epu16(words, most));
#endif
}
#if !defined(__AVXVNNI__)
// Four terms of each of eight channels -> two terms of each, and the other two, as words.
DEIT_INLINE void widen_factors(const int8_t* from, Factor* first, Factor* second) {
  const Ints bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const Ints turned = _mm256_permute4x64_epi64(bytes, 0xd8);  // channels 0 1 4 5, 2 3 6 7
  const Vec low = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(turned)));
  const Vec high = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(turned, 1)));
  store(reinterpret_cast<float*>(first), _mm256_shuffle_ps(low, high, 0x88));
  store(reinterpret_cast<float*>(second), _mm256_shuffle_ps(low, high, 0xdd));
}
#endif

#elif defined(DEIT_NEON)  // values only, never timed, as simd_neon.inl

using Ints = int32x4_t;
DEIT_INLINE Ints broadcast_ints(int32_t a) { return vdupq_n_s32(a); }
DEIT_INLINE Ints load_ints(const int32_t* p) { return vld1q_s32(p); }
DEIT_INLINE Ints load_factors(const int8_t* p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
DEIT_INLINE Ints multiply(Ints a, Ints b) { return vmulq_s32(a, b); }
DEIT_INLINE Vec to_floats(Ints a) { return vcvtq_f32_s32(a); }
DEIT_INLINE Ints dot(Ints c, Ints activations, Ints weights) {
  const int8x16_t a = vreinterpretq_s8_s32(activations), b = vreinterpretq_s8_s32(weights);
#if defined(DEIT_SDOT)
  return vdotq_s32(c, a, b);
#else
  // Two products fit 16 bits, as no weight is -128: 2 * 128 * 127 = 32512.
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpadalq_s16(c, vpaddq_s16(low, high));
#endif
}
#if defined(DEIT_SMMLA)
DEIT_INLINE Ints low_halves(Ints a, Ints b) {
  return vcombine_s32(vget_low_s32(a), vget_low_s32(b));
}
DEIT_INLINE Ints high_halves(Ints a, Ints b) {
  return vcombine_s32(vget_high_s32(a), vget_high_s32(b));
}
// c[i][j] + the sum of eight products over row i of a and row j of b, all of two rows.
DEIT_INLINE Ints multiply_square(Ints a, Ints b, Ints c) {
  return vmmlaq_s32(c, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#endif
DEIT_INLINE void store_factors(uint8_t* p, Vec a, int32_t zero) {
  const uint16x4_t words = vqmovun_s32(vaddq_s32(vcvtnq_s32_f32(a), vdupq_n_s32(zero)));
  const uint8x8_t bytes = vqmovn_u16(vcombine_u16(words, words));
  const uint8x8_t flipped = veor_u8(bytes, vdup_n_u8(0x80));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(flipped), 0);
  std::memcpy(p, &four, sizeof four);
}

#else  // Any processor.

using Ints = IntVec;
DEIT_INLINE Ints broadcast_ints(int32_t a) { return Ints{a, a, a, a}; }
DEIT_INLINE Ints load_ints(const int32_t* p) {
  Ints a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
DEIT_INLINE Ints load_factors(const int8_t* p) {
  Ints a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
// Unsigned, because two's complement wraps as the vector instructions do.
DEIT_INLINE Ints multiply(Ints a, Ints b) {
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  return reinterpret_cast<Ints>(reinterpret_cast<Unsigned>(a) * reinterpret_cast<Unsigned>(b));
}
DEIT_INLINE Vec to_floats(Ints a) { return __builtin_convertvector(a, Vec); }
DEIT_INLINE Ints dot(Ints c, Ints unsigned_bytes, Ints signed_bytes) {
  // Shifts split the bytes of every lane, so the compiler needs no byte shuffles.
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  const Unsigned u = reinterpret_cast<Unsigned>(unsigned_bytes);
  const Unsigned s = reinterpret_cast<Unsigned>(signed_bytes);
  Unsigned total = reinterpret_cast<Unsigned>(c);
  for (int byte = 0; byte < 4; ++byte) {
    const Ints weight = reinterpret_cast<Ints>(s << (24 - 8 * byte)) >> 24;
    total += ((u >> (8 * byte)) & 0xffu) * reinterpret_cast<Unsigned>(weight);
  }
  return reinterpret_cast<Ints>(total);
}
DEIT_INLINE void store_factors(uint8_t* p, Vec a, int32_t zero) {
  const Vec nearest = round(a);
  for (int i = 0; i < kWidth; ++i) {
    // A NaN row's scale is NaN, so any byte will do; converting one would be undefined.
    const int32_t q = nearest[i] == nearest[i] ? static_cast<int32_t>(nearest[i]) + zero : 0;
    p[i] = static_cast<uint8_t>(q > 255 ? 255 : q);
  }
}

#endif

#if !defined(__AVX2__) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
DEIT_INLINE void widen_factors(const int8_t*, Factor*, Factor*) {}  // bytes stay as they are
#endif

}  // namespace DEIT_ISA
}  // namespace deit
