// Arm's NEON, 32 registers of four lanes. Included by simd.h.
//
// Values only, never timed: `make arm` runs what is compiled from this under an emulator, and no
// Arm processor has. So "auto" takes none of it before it was measured where it runs.

using Vec = float32x4_t;
constexpr int kWidth = 4;
constexpr bool kFused = true;

DEIT_INLINE Vec broadcast(float a) { return vdupq_n_f32(a); }
DEIT_INLINE Vec load(const float* p) { return vld1q_f32(p); }
DEIT_INLINE void store(float* p, Vec a) { vst1q_f32(p, a); }
DEIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
// Not FMAX and FMIN, which are NaN where either is.
DEIT_INLINE Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
DEIT_INLINE Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
DEIT_INLINE Vec round(Vec a) { return vrndnq_f32(a); }
DEIT_INLINE Vec power_of_two(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
DEIT_INLINE Vec scale_by_power(Vec a, Vec n) {
  const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  return a * power_of_two(half) * power_of_two(vsubq_s32(whole, half));
}
DEIT_INLINE float sum(Vec a) { return vaddvq_f32(a); }
DEIT_INLINE float largest(Vec a) { return vmaxvq_f32(a); }
DEIT_INLINE Vec first(Vec a, int n) {
  const int32x4_t lane = {0, 1, 2, 3};
  const uint32x4_t kept = vcltq_s32(lane, vdupq_n_s32(n));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), kept));
}
DEIT_INLINE Vec swap_pairs(Vec a) { return vrev64q_f32(a); }

DEIT_INLINE Vec load(const BF16* p) {
  const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(half), 16));
}
DEIT_INLINE Vec load(const F16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
DEIT_INLINE void store(BF16* p, Vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t top = vbslq_u32(vceqq_f32(a, a), nearest, vdupq_n_u32(0x7fc00000));
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(top, 16));
}
DEIT_INLINE void store(F16* p, Vec a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a)));
}

DEIT_INLINE Vec multiply_pairs(Vec a, Vec b, Vec c) {
  const uint32x4_t x = vreinterpretq_u32_f32(a), y = vreinterpretq_u32_f32(b);
  const uint32x4_t high = vdupq_n_u32(0xffff0000u);
  c = fma(vreinterpretq_f32_u32(vshlq_n_u32(x, 16)), vreinterpretq_f32_u32(vshlq_n_u32(y, 16)), c);
  return fma(vreinterpretq_f32_u32(vandq_u32(x, high)), vreinterpretq_f32_u32(vandq_u32(y, high)),
             c);
}

DEIT_INLINE Vec load_pairs(const BF16* low, const BF16* high) {
  const uint16x4_t even = vld1_u16(reinterpret_cast<const uint16_t*>(low));
  const uint16x4_t odd = vld1_u16(reinterpret_cast<const uint16_t*>(high));
  return vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(even, odd), vzip2_u16(even, odd)));
}

// Two rows of two words each, of lanes; and the lower and upper halves of squares [2, 2], which are
// their rows.
DEIT_INLINE Vec low_halves(Vec a, Vec b) { return vcombine_f32(vget_low_f32(a), vget_low_f32(b)); }
DEIT_INLINE Vec high_halves(Vec a, Vec b) {
  return vcombine_f32(vget_high_f32(a), vget_high_f32(b));
}

#if defined(DEIT_BFMMLA)
// c[i][j] + the sum of four products of bf16 over row i of a and row j of b, all of two rows. The
// processor rounds these sums to odd.
DEIT_INLINE Vec multiply_square(Vec a, Vec b, Vec c) {
  return vbfmmlaq_f32(c, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}
DEIT_INLINE Vec narrowed(Vec low, Vec high) {
  return vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
}
DEIT_INLINE Vec interleaved(Vec low, Vec high) {
  const uint16x4_t even = vreinterpret_u16_bf16(vcvt_bf16_f32(low));
  const uint16x4_t odd = vreinterpret_u16_bf16(vcvt_bf16_f32(high));
  return vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(even, odd), vzip2_u16(even, odd)));
}
#endif

DEIT_INLINE void transpose(Vec (&r)[4]) {
  const Vec even[2] = {vtrn1q_f32(r[0], r[1]), vtrn1q_f32(r[2], r[3])};
  const Vec odd[2] = {vtrn2q_f32(r[0], r[1]), vtrn2q_f32(r[2], r[3])};
  r[0] = low_halves(even[0], even[1]);
  r[1] = low_halves(odd[0], odd[1]);
  r[2] = high_halves(even[0], even[1]);
  r[3] = high_halves(odd[0], odd[1]);
}
