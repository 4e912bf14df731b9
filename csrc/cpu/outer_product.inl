// The one micro-kernel of the fp32 and bf16 products: an outer product in registers. Included by
// kernels.cpp.
//
// linear.inl runs it on tiles of its own. Attention, its gradient and a weight's gradient run it by
// `multiply`, on panels of kPanel columns: DeiT's heads are 64 wide, a whole panel with AVX-512.

#if defined(__AVX512F__) || defined(DEIT_NEON)
constexpr int kRows = 6, kCols = 4;  // 24 accumulators, 4 of B and 1 of A: 29 of 32 registers
#else
constexpr int kRows = 6, kCols = 2;  // 12 accumulators, 2 of B and 1 of A: 15 of 16 registers
#endif
constexpr int64_t kPanel = kCols * kWidth;  // columns of one panel
constexpr int64_t kLine = 16;               // floats of a cache line

DEIT_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

#if defined(DEIT_BFMMLA)
#include "outer_product_bfmmla.inl"
#endif

// c[MR, NV * kWidth] (= or +=) a b, of words that hold W. Every sum is one chain over the depth,
// so its bits depend on its terms alone and not on the tile. b is [depth, NV * kWidth]; a is
// [depth, MR] with kOuter, else [MR, depth].
template <class W, bool kOuter, int MR, int NV>
DEIT_INLINE void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb,
                                int64_t depth, bool add, float* c, int64_t ldc) {
#if defined(DEIT_BFMMLA)
  if constexpr (kIsPair<W> && !kOuter) {
    return multiply_squares<MR, NV>(a, lda, b, ldb, depth, add, c, ldc);
  }
#endif
  Vec sums[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sums[i][j] = broadcast(0.0f);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load(b + k * ldb + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vec factor = broadcast(kOuter ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sums[i][j] = multiply_word<W>(factor, row[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * ldc + j * kWidth;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <class W, bool kOuter, int MR>
DEIT_INLINE void multiply_vectors(const float* a, int64_t lda, const float* b, int64_t ldb,
                                  int64_t depth, int vectors, bool add, float* c, int64_t ldc) {
  constexpr int kThree = kCols < 3 ? kCols : 3;
  switch (vectors) {
    case 1: return multiply_block<W, kOuter, MR, 1>(a, lda, b, ldb, depth, add, c, ldc);
    case 2: return multiply_block<W, kOuter, MR, 2>(a, lda, b, ldb, depth, add, c, ldc);
    case 3: return multiply_block<W, kOuter, MR, kThree>(a, lda, b, ldb, depth, add, c, ldc);
    default: return multiply_block<W, kOuter, MR, kCols>(a, lda, b, ldb, depth, add, c, ldc);
  }
}

// Rows kRows to 2 * kRows of `a`, as far as there are any.
DEIT_INLINE void prefetch_rows(const float* a, int64_t lda, int64_t rows, int64_t depth) {
  for (int64_t i = kRows; i < rows && i < 2 * kRows; ++i) {
    for (int64_t k = 0; k < depth; k += kLine) __builtin_prefetch(a + i * lda + k);
  }
}

// c[rows, vectors * kWidth] (= or +=) a b with vectors <= kCols, each sum one chain. A chain of a
// row is 3 or 4 cache lines in training, too few for the processor to foresee the next row's:
// without the prefetch the MLP of DeiT-B took 8 % longer in chains of 48 than in chains of 64, with
// it 0.
// Attention's forward goes without (kAhead): its rows lie in the cache. In one function with
// training's products both were 3 to 5 % slower with AVX2.
template <class W, bool kOuter, bool kAhead = !kOuter>
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
              int64_t depth, int vectors, bool add, float* c, int64_t ldc) {
  const int64_t step = kOuter ? 1 : lda;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    if (kAhead) prefetch_rows(a + i * lda, lda, rows - i, depth);
    multiply_vectors<W, kOuter, kRows>(a + i * step, lda, b, ldb, depth, vectors, add,
                                       c + i * ldc, ldc);
  }
  for (; i + 2 <= rows; i += 2) {
    multiply_vectors<W, kOuter, 2>(a + i * step, lda, b, ldb, depth, vectors, add, c + i * ldc,
                                   ldc);
  }
  for (; i < rows; ++i) {
    multiply_vectors<W, kOuter, 1>(a + i * step, lda, b, ldb, depth, vectors, add, c + i * ldc,
                                   ldc);
  }
}

DEIT_INLINE int vectors_of(int64_t columns) {
  return static_cast<int>(((columns < kPanel ? columns : kPanel) + kWidth - 1) / kWidth);
}

// Rows of `from` into a panel of words, [words, kColumns], zeros past `columns`.
template <int64_t kColumns, class T>
DEIT_INLINE void pack_columns(const T* from, int64_t ldf, int64_t rows, int64_t columns,
                              float* to) {
  const int64_t count = columns < kColumns ? columns : kColumns;
  for (; rows > 0; rows -= kInWord<T>, from += kInWord<T> * ldf, to += kColumns) {
    for (int64_t j = 0; j < kColumns; j += kWidth) {
      const int64_t left = count - j;
      store(to + j, left >= kWidth ? load_words(from + j, ldf, rows, kWidth)
                    : left > 0     ? load_words(from + j, ldf, rows, static_cast<int>(left))
                                   : broadcast(0.0f));
    }
  }
}
