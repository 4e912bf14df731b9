// The micro-kernel's products of bf16 where the processor multiplies two rows by two columns over
// four terms in one instruction (Arm's BFMMLA): twice the multiply-adds of its BFDOT, which would
// read words as `multiply_pairs` does. Included by outer_product.inl.
//
// Its operands hold two words of each row, of each column. Panels have one word of every column
// side by side, as for all sets, and two such vectors interleave to two columns' operands.

template <class W>
constexpr bool kIsPair = false;
template <>
constexpr bool kIsPair<BF16> = true;

// A row's words k and k + 1, and another's; zeros for the second words past the depth.
DEIT_INLINE Vec two_rows(const float* a, const float* b, bool whole) {
  if (whole) return vcombine_f32(vld1_f32(a), vld1_f32(b));
  return Vec{a[0], 0.0f, b[0], 0.0f};
}

// As `multiply_block`, of words that are pairs, a in rows. An odd row goes in twice.
template <int MR, int NV>
DEIT_INLINE void multiply_squares(const float* a, int64_t lda, const float* b, int64_t ldb,
                                  int64_t depth, bool add, float* c, int64_t ldc) {
  constexpr int kPairs = (MR + 1) / 2;
  Vec sums[kPairs][2 * NV];  // [2, 2] each
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < 2 * NV; ++j) sums[i][j] = broadcast(0.0f);
  }
  const auto step = [&](int64_t k, bool whole) __attribute__((always_inline)) {
    Vec rows[kPairs];
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const float* row = a + 2 * i * lda + k;
      rows[i] = two_rows(row, 2 * i + 1 < MR ? row + lda : row, whole);
    }
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const float* words = b + k * ldb + j * kWidth;
      const Vec one = load(words), other = whole ? load(words + ldb) : broadcast(0.0f);
      const Vec left = vzip1q_f32(one, other), right = vzip2q_f32(one, other);
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        sums[i][2 * j] = multiply_square(rows[i], left, sums[i][2 * j]);
        sums[i][2 * j + 1] = multiply_square(rows[i], right, sums[i][2 * j + 1]);
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2) step(k, true);
  if (k < depth) step(k, false);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const Vec left = sums[i / 2][2 * j], right = sums[i / 2][2 * j + 1];
      const Vec row = i % 2 ? high_halves(left, right) : low_halves(left, right);
      float* to = c + i * ldc + j * kWidth;
      store(to, add ? load(to) + row : row);
    }
  }
}
