// The products of one tile where the processor multiplies two rows by two channels over eight terms
// in one instruction (Arm's SMMLA): twice the multiply-adds of its SDOT. Included by
// int8_linear.inl.
//
// Packed weights have four terms of every channel side by side, as for all sets. Two such vectors
// interleave to two channels' operands.

// Two rows' factors of four terms and, of `whole`, of the next four; else zeros.
DEIT_INLINE Ints two_rows(const UnsignedFactor* a, const UnsignedFactor* b, bool whole) {
  if (whole) return vreinterpretq_s32_u8(vcombine_u8(vld1_u8(a), vld1_u8(b)));
  return Ints{lane(a), 0, lane(b), 0};
}

// sums += the products. An odd row goes in twice.
template <int MR>
DEIT_INLINE void add_products(const Tile& t, Ints (&sums)[MR][kTileVectors]) {
  constexpr int kPairs = (MR + 1) / 2;
  constexpr int64_t kNext = kTerms * kPanelColumns;
  Ints squares[kPairs][2 * kTileVectors];  // [2, 2] each
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * kTileVectors; ++j) squares[i][j] = broadcast_ints(0);
  }
  const auto step = [&](int64_t k, bool whole) __attribute__((always_inline)) {
    Ints rows[kPairs];
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const UnsignedFactor* row = t.a + 2 * i * t.lda + k * kTerms;
      rows[i] = two_rows(row, 2 * i + 1 < MR ? row + t.lda : row, whole);
    }
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      const Factor* weights = t.b + k * kNext + kTerms * j * kWidth;
      const Ints one = load_factors(weights);
      const Ints other = whole ? load_factors(weights + kNext) : broadcast_ints(0);
      const Ints left = vzip1q_s32(one, other), right = vzip2q_s32(one, other);
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) {
        squares[i][2 * j] = multiply_square(rows[i], left, squares[i][2 * j]);
        squares[i][2 * j + 1] = multiply_square(rows[i], right, squares[i][2 * j + 1]);
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 <= t.steps; k += 2) step(k, true);
  if (k < t.steps) step(k, false);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      const Ints left = squares[i / 2][2 * j], right = squares[i / 2][2 * j + 1];
      const Ints row = i % 2 ? high_halves(left, right) : low_halves(left, right);
      sums[i][j] = vaddq_s32(sums[i][j], row);
    }
  }
}
