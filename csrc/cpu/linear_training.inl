// fp32 matrix products for training, forward and backward. Included by kernels.cpp.
//
// Why not oneDNN's, which is as fast: it adds up to 1000 terms in one chain, and its error at
// DeiT's depths (5.3e-7 at 1536 against 2.6e-7 of PyTorch's own linear layer) breaks the error
// rule; its sums over 50000 rows depend on the number of threads; and a pass over a hidden layer
// that an epilogue saves costs a sixth of its product in DeiT-Ti.
//
// The micro-kernel is an outer product in registers, `kRows` by `kPanel`. `b` comes in panels of
// kPanel columns, so that a step of depth reads it with unit stride. Chains are kLayerChain terms
// long and are added in order, so a sum's bits depend on nothing but its terms.

// All of a chain behind an outlier rounds at the outlier's size, also where outliers cancel and a
// hidden value near 0 is left, on which GELU's gradient hangs. In chains of 64 that value was off by
// 1.12 times PyTorch's error (outliers at 5, 69 and 133 of 192 inputs, each early in its chain)
// and a weight's gradient by up to 1.7; in chains of 48 they are by 0.76 and 1.1. Chains of 32 gain
// nothing on that and are up to 7 % slower.
constexpr int64_t kLayerChain = kWidth == 4 ? kChain : 48;
constexpr int64_t kLine = 16;     // floats of a cache line
constexpr int64_t kRowTile = 96;  // rows of a task: a panel's block is read 16 times from L1

// c[MR, NV * kWidth] (= or +=) a b, one chain a sum. kOuter: a is [depth, MR], else [MR, depth].
template <bool kOuter, int MR, int NV>
DEIT_INLINE void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb,
                                int64_t depth, bool add, float* c, int64_t ldc) {
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
      for (int j = 0; j < NV; ++j) sums[i][j] = fma(factor, row[j], sums[i][j]);
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

template <bool kOuter, int MR>
DEIT_INLINE void multiply_vectors(const float* a, int64_t lda, const float* b, int64_t ldb,
                                  int64_t depth, int vectors, bool add, float* c, int64_t ldc) {
  constexpr int kThree = kCols < 3 ? kCols : 3;
  switch (vectors) {
    case 1: return multiply_block<kOuter, MR, 1>(a, lda, b, ldb, depth, add, c, ldc);
    case 2: return multiply_block<kOuter, MR, 2>(a, lda, b, ldb, depth, add, c, ldc);
    case 3: return multiply_block<kOuter, MR, kThree>(a, lda, b, ldb, depth, add, c, ldc);
    default: return multiply_block<kOuter, MR, kCols>(a, lda, b, ldb, depth, add, c, ldc);
  }
}

// Rows kRows to 2 * kRows of `a`, as far as there are any.
DEIT_INLINE void prefetch_rows(const float* a, int64_t lda, int64_t rows, int64_t depth) {
  for (int64_t i = kRows; i < rows && i < 2 * kRows; ++i) {
    for (int64_t k = 0; k < depth; k += kLine) __builtin_prefetch(a + i * lda + k);
  }
}

// c[rows, vectors * kWidth] (= or +=) a b with vectors <= kCols; kOuter: a is [depth, rows].
// A chain of a row is 3 or 4 cache lines, too few for the processor to foresee the next row's: without
// the prefetch the MLP of DeiT-B took 8 % longer in chains of 48 than in chains of 64, with it 0.
template <bool kOuter>
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
              int64_t depth, int vectors, bool add, float* c, int64_t ldc) {
  const int64_t step = kOuter ? 1 : lda;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    if (!kOuter) prefetch_rows(a + i * lda, lda, rows - i, depth);
    multiply_vectors<kOuter, kRows>(a + i * step, lda, b, ldb, depth, vectors, add, c + i * ldc,
                                    ldc);
  }
  for (; i + 2 <= rows; i += 2) {
    multiply_vectors<kOuter, 2>(a + i * step, lda, b, ldb, depth, vectors, add, c + i * ldc, ldc);
  }
  for (; i < rows; ++i) {
    multiply_vectors<kOuter, 1>(a + i * step, lda, b, ldb, depth, vectors, add, c + i * ldc, ldc);
  }
}

DEIT_INLINE int vectors_of(int64_t columns) {
  return static_cast<int>(((columns < kPanel ? columns : kPanel) + kWidth - 1) / kWidth);
}

// Rows of `from` into a panel [rows, kPanel], zeros past `columns`.
DEIT_INLINE void pack_panel(const float* from, int64_t ldf, int64_t rows, int64_t columns,
                            float* to) {
  const int64_t count = columns < kPanel ? columns : kPanel;
  for (int64_t i = 0; i < rows; ++i, from += ldf, to += kPanel) {
    for (int64_t j = 0; j < kPanel; j += kWidth) {
      const int64_t left = count - j;
      store(to + j, left >= kWidth ? load(from + j)
                    : left > 0     ? load_first(from + j, static_cast<int>(left))
                                   : broadcast(0.0f));
    }
  }
}

void pack_operand(const PackArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first_column = panel * kPanel, left = args.width - first_column;
    float* to = args.panels + first_column * args.depth;
    if (args.transposed) {
      pack_keys(args.b + first_column * args.ldb, args.ldb, left < kPanel ? left : kPanel,
                args.depth, to);
    } else {
      pack_panel(args.b + first_column, args.ldb, args.depth, left, to);
    }
  }
}

// The epilogue on `sums`, [rows, columns] at row stride kPanel, of the product's columns from
// `column`.
DEIT_INLINE void finish(const TrainingProductArgs& p, const float* sums, int64_t column, int64_t columns) {
  for (int64_t row = 0; row < p.rows; ++row, sums += kPanel) {
    const int64_t sample = p.keep ? (p.first_row + row) / p.rows_per_sample : 0;
    const Vec kept = broadcast(p.keep ? p.keep[sample] : 1.0f);
    const int64_t at = row * p.width + column;
    each_vector(columns, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      Vec y = load(sums + j);
      if (p.hidden) {
        const Activated gelu = activate(load_lanes(p.hidden + at + j, lanes), p.activation);
        if (p.activated) store_lanes(p.activated + at + j, gelu.value, lanes);
        return store_lanes(p.out + at + j, y * gelu.slope, lanes);
      }
      if (p.bias) y = y + load_lanes(p.bias + column + j, lanes);
      if (p.affine) store_lanes(p.affine + at + j, y, lanes);
      if (p.activation != Activation::none) y = activate(y, p.activation).value;
      if (p.gamma) y = y * load_lanes(p.gamma + column + j, lanes);
      if (p.keep) y = y * kept;
      if (p.residual) y = load_lanes(p.residual + at + j, lanes) + y;
      store_lanes(p.out + at + j, y, lanes);
    });
  }
}

// The whole of `p`, which has kRowTile rows at most.
void product_tile(const TrainingProductArgs& p, float* sums) {
  for (int64_t column = 0; column < p.width; column += kPanel) {
    const int64_t left = p.width - column, columns = left < kPanel ? left : kPanel;
    const float* panel = p.panels + column * p.depth;
    for (int64_t k = 0; k < p.depth; k += kLayerChain) {
      const int64_t chain = p.depth - k < kLayerChain ? p.depth - k : kLayerChain;
      multiply<false>(p.a + k, p.lda, panel + k * kPanel, kPanel, p.rows, chain,
                      vectors_of(columns), k > 0, sums, kPanel);
    }
    finish(p, sums, column, columns);
  }
}

// `p` on its tile of rows.
DEIT_INLINE TrainingProductArgs on_tile(TrainingProductArgs p, int64_t tile) {
  const int64_t row = tile * kRowTile;
  p.rows = p.rows - row < kRowTile ? p.rows - row : kRowTile;
  p.first_row += row;
  if (p.a) p.a += row * p.lda;
  float** const written[] = {&p.out, &p.affine, &p.activated};
  for (float** to : written) {
    if (*to) *to += row * p.width;
  }
  const float** const read[] = {&p.residual, &p.hidden};
  for (const float** from : read) {
    if (*from) *from += row * p.width;
  }
  return p;
}

size_t product_workspace(const TrainingProductArgs& p) {
  return static_cast<size_t>(kRowTile * kPanel + (p.before ? kRowTile * p.before->width : 0));
}

void product_tiles(const TrainingProductArgs& args, float* sums, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    TrainingProductArgs p = on_tile(args, tile);
    if (args.before) {
      TrainingProductArgs first = on_tile(*args.before, tile);
      first.out = sums + kRowTile * kPanel;
      product_tile(first, sums);
      p.a = first.out;
    }
    product_tile(p, sums);
  }
}
