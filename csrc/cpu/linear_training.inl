// The products of training in fp32 and bf16, forward and backward. Included by kernels.cpp.
//
// Why not oneDNN's, which is as fast: it adds up to 1000 terms in one chain, and its error at
// DeiT's depths (5.3e-7 at 1536 against 2.6e-7 of PyTorch's own linear layer) breaks the error
// rule; its sums over 50000 rows depend on the number of threads; and a pass over a hidden layer
// that an epilogue saves costs a sixth of its product in DeiT-Ti.
//
// Why not linear.inl's driver, which has the same micro-kernel: training needs shorter chains
// (below). That driver writes and reads a block's sums once a chain, and in four times as many
// chains its sums of 800 rows crowd the second-level cache. This one sums a tile of 96 rows, 24 KB,
// over the whole depth, on weights packed before. Inference has too few rows for that packing to
// pay. GMAC/s of a Zen 4 core, AVX-512, best of 40 turns about, other work on the machine:
//
//     rows x depth x width   linear.inl   this one   linear.inl in chains of 48
//       197 x 192 x 576         53.1        49.3        50.4
//       197 x 768 x 192         54.4        51.0        51.8
//      1576 x 192 x 768         49.7        47.1        47.3
//      1576 x 768 x 192         51.2        50.6        46.6
//      6304 x 384 x 1536        40.4        41.3        38.5
//
// Neither blocks of 200 and 400 rows nor weights packed before, in blocks of 96 and 192, mended
// that: it stayed up to 14 % behind at 788 and 1576 rows of DeiT-Ti and S, and came out 8 % ahead
// at 1576 x 768 x 3072 alone.
//
// `b` comes in panels of kPanel columns, so that a step of depth reads it with unit stride. Chains
// are kLayerChain terms long and are added in order, so a sum's bits depend on nothing but its
// terms.

// Every term after an outlier in its chain rounds at the outlier's size. It shows where outliers
// cancel and leave a hidden value near 0, on which GELU's gradient hangs. In chains of 64 that
// value was off by 1.12 times PyTorch's error (outliers at 5, 69 and 133 of 192 inputs, each early
// in its chain) and a weight's gradient by up to 1.7. In chains of 48 they are off by 0.76 and 1.1.
// Chains of 32 gain nothing on that and are up to 7 % slower.
constexpr int64_t kLayerChain = kFused ? 48 : kChain;
// In bf16 every operand was rounded at 2^-9, and chains are as long as those of inference.
template <class T>
constexpr int64_t kChainOf = sizeof(T) == sizeof(float) ? kLayerChain : 192;
constexpr int64_t kRowTile = 96;  // rows of a task: a panel's block is read 16 times from L1
// Rows that are multiplied and finished before the next ones. With AVX-512 a product is too fast to
// hide what its epilogue waits for, lines of the outputs and of the hidden layer: those of 6 rows are
// fetched while these are multiplied. ms of a hidden layer's gradient before and now, 1576 rows, one
// core of a Zen 4 beside other work, D = 192 / 384 (with 12 or 24 rows most of it is lost):
//     bf16   4.8 / 14.3   3.4 / 10.5
//     fp32   7.0 / 22.6   6.4 / 21.1
// With AVX2 it changed nothing.
constexpr int64_t kRowsAtOnce = kWidth == 16 ? kRows : kRowTile;

template <class T>
void pack_operand_typed(const PackArgs& args, int64_t begin, int64_t end) {
  const T* b = static_cast<const T*>(args.b);
  const int64_t words = (args.depth + kInWord<T> - 1) / kInWord<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first_column = panel * kPanel, left = args.width - first_column;
    float* to = args.panels + first_column * words;
    if (args.transposed) {
      pack_keys(reinterpret_cast<const float*>(b + first_column * args.ldb),
                args.ldb / kInWord<T>, left < kPanel ? left : kPanel, words, to);
    } else {
      pack_columns<kPanel>(b + first_column, args.ldb, args.depth, left, to);
    }
  }
}

void pack_operand(const PackArgs& args, int64_t begin, int64_t end) {
  args.type == Scalar::f32 ? pack_operand_typed<float>(args, begin, end)
                           : pack_operand_typed<BF16>(args, begin, end);
}

// What the forward takes of an activation. In fp32 its backward computes the same bits again. In
// bf16 that starts from an `affine` that was rounded, so the cheaper GELU serves.
template <class T>
DEIT_INLINE Vec activated_by(Vec y, Activation activation) {
  if (sizeof(T) < sizeof(float) && activation == Activation::gelu) return gelu(y);
  return activate_with_slope(y, activation).value;
}

// Two vectors of a row: those of `left` columns that are there, zeros in the others.
struct Two {
  Vec of[2];
};
DEIT_INLINE int lanes_of(int64_t left, int v) {
  const int64_t lanes = left - v * kWidth;
  return static_cast<int>(lanes > kWidth ? kWidth : lanes > 0 ? lanes : 0);
}
template <bool kWhole, class P>
DEIT_INLINE Two load_both(const P* p, int64_t left) {
  if (kWhole) return {{load(p), load(p + kWidth)}};
  const Vec none = broadcast(0.0f);
  return {{load_first(p, lanes_of(left, 0)),
           left > kWidth ? load_first(p + kWidth, lanes_of(left, 1)) : none}};
}
template <bool kWhole, class P>
DEIT_INLINE void store_both(P* p, Two a, int64_t left) {
  if (kWhole) return round_two(p, a.of[0], a.of[1]);
  store_first(p, a.of[0], lanes_of(left, 0));
  if (left > kWidth) store_first(p + kWidth, a.of[1], lanes_of(left, 1));
}

// The epilogue of a gradient on two vectors of sums, at element `at` of the matrices.
template <class T, class Out, bool kWhole>
DEIT_INLINE void finish_gradient(const TrainingProductArgs& p, Two y, int64_t at, int64_t left) {
  Two value = load_both<kWhole>(static_cast<const T*>(p.hidden) + at, left);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const Activated found = activate_with_slope(value.of[v], p.activation);
    value.of[v] = found.value;
    y.of[v] = y.of[v] * found.slope;
  }
  if (p.activated) store_both<kWhole>(static_cast<T*>(p.activated) + at, value, left);
  store_both<kWhole>(static_cast<Out*>(p.out) + at, y, left);
}

// That of the forward; `column` of the parameters.
template <class T, class Out, bool kWhole>
DEIT_INLINE void finish_forward(const TrainingProductArgs& p, Two y, int64_t at, int64_t column,
                                Vec kept, int64_t left) {
  const auto each = [&](auto&& f) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) y.of[v] = f(v, y.of[v]);
  };
  if (p.bias) {
    const Two bias = load_both<kWhole>(p.bias + column, left);
    each([&](int v, Vec a) __attribute__((always_inline)) { return a + bias.of[v]; });
  }
  if (p.affine) store_both<kWhole>(static_cast<T*>(p.affine) + at, y, left);
  if (p.activation != Activation::none) {
    each([&](int, Vec a) __attribute__((always_inline)) { return activated_by<T>(a, p.activation); });
  }
  if (p.gamma) {
    const Two gamma = load_both<kWhole>(p.gamma + column, left);
    each([&](int v, Vec a) __attribute__((always_inline)) { return a * gamma.of[v]; });
  }
  if (p.keep) each([&](int, Vec a) __attribute__((always_inline)) { return a * kept; });
  if (p.residual) {
    const Two residual = load_both<kWhole>(static_cast<const Out*>(p.residual) + at, left);
    each([&](int v, Vec a) __attribute__((always_inline)) { return residual.of[v] + a; });
  }
  store_both<kWhole>(static_cast<Out*>(p.out) + at, y, left);
}

template <class T, class Out, bool kWhole>
DEIT_INLINE void finish_two(const TrainingProductArgs& p, const float* sums, int64_t at,
                            int64_t column, Vec kept, int64_t left) {
  const Two y = {{load(sums), load(sums + kWidth)}};
  p.hidden ? finish_gradient<T, Out, kWhole>(p, y, at, left)
           : finish_forward<T, Out, kWhole>(p, y, at, column, kept, left);
}

// The epilogue on `sums` of rows [begin, end), at row stride kPanel, of the product's columns from
// `column`.
template <class T, class Out>
DEIT_INLINE void finish(const TrainingProductArgs& p, const float* sums, int64_t begin, int64_t end,
                        int64_t column, int64_t columns) {
  static_assert(kPanel % (2 * kWidth) == 0, "a panel is pairs of vectors");
  for (int64_t row = begin; row < end; ++row, sums += kPanel) {
    const int64_t sample = p.keep ? (p.first_row + row) / p.rows_per_sample : 0;
    const Vec kept = broadcast(p.keep ? p.keep[sample] : 1.0f);
    const int64_t at = row * p.width + column;
    for (int64_t j = 0; j < columns; j += 2 * kWidth) {
      const int64_t left = columns - j;
      left >= 2 * kWidth ? finish_two<T, Out, true>(p, sums + j, at + j, column + j, kept, left)
                         : finish_two<T, Out, false>(p, sums + j, at + j, column + j, kept, left);
    }
  }
}

// What the epilogue of rows [begin, end) will touch, on its way while they are multiplied.
template <class P>
DEIT_INLINE void prefetch_part(const void* matrix, int64_t begin, int64_t end, int64_t width,
                               int64_t column, int64_t columns) {
  if (!matrix) return;
  for (int64_t row = begin; row < end; ++row) {
    const P* from = static_cast<const P*>(matrix) + row * width + column;
    for (int64_t j = 0; j < columns; j += kLine * kInWord<P>) __builtin_prefetch(from + j);
  }
}

// The whole of `p`, which has kRowTile rows at most.
template <class T, class Out>
void product_tile(const TrainingProductArgs& p, float* sums) {
  for (int64_t column = 0; column < p.width; column += kPanel) {
    const int64_t left = p.width - column, columns = left < kPanel ? left : kPanel;
    const float* panel = p.panels + column * p.depth;
    for (int64_t row = 0; row < p.rows; row += kRowsAtOnce) {
      const int64_t rows = p.rows - row < kRowsAtOnce ? p.rows - row : kRowsAtOnce;
      if (kRowsAtOnce < kRowTile) {
        const int64_t end = row + rows;
        prefetch_part<Out>(p.out, row, end, p.width, column, columns);
        prefetch_part<Out>(p.residual, row, end, p.width, column, columns);
        prefetch_part<T>(p.affine, row, end, p.width, column, columns);
        prefetch_part<T>(p.hidden, row, end, p.width, column, columns);
        prefetch_part<T>(p.activated, row, end, p.width, column, columns);
      }
      for (int64_t k = 0; k < p.depth; k += kChainOf<T>) {
        const int64_t chain = p.depth - k < kChainOf<T> ? p.depth - k : kChainOf<T>;
        multiply<T, false>(p.a + row * p.lda + k, p.lda, panel + k * kPanel, kPanel, rows, chain,
                           vectors_of(columns), k > 0, sums, kPanel);
      }
      finish<T, Out>(p, sums, row, row + rows, column, columns);
    }
  }
}

// `p` on its tile of rows.
template <class T, class Out>
DEIT_INLINE TrainingProductArgs on_tile(TrainingProductArgs p, int64_t tile) {
  const int64_t row = tile * kRowTile, at = row * p.width;
  p.rows = p.rows - row < kRowTile ? p.rows - row : kRowTile;
  p.first_row += row;
  if (p.a) p.a += row * p.lda;
  if (p.out) p.out = static_cast<Out*>(p.out) + at;
  if (p.residual) p.residual = static_cast<const Out*>(p.residual) + at;
  if (p.affine) p.affine = static_cast<T*>(p.affine) + at;
  if (p.hidden) p.hidden = static_cast<const T*>(p.hidden) + at;
  if (p.activated) p.activated = static_cast<T*>(p.activated) + at;
  return p;
}

// A product before another has that one's depth, in words, for its width.
size_t product_workspace(const TrainingProductArgs& p) {
  return static_cast<size_t>(kRowTile * kPanel + (p.before ? kRowTile * p.depth : 0));
}

template <class T, class Out>
void product_tiles_typed(const TrainingProductArgs& args, float* sums, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    TrainingProductArgs p = on_tile<T, Out>(args, tile);
    if (args.before) {
      TrainingProductArgs first = on_tile<T, T>(*args.before, tile);
      float* between = sums + kRowTile * kPanel;
      first.out = between;
      product_tile<T, T>(first, sums);
      p.a = between;
    }
    product_tile<T, Out>(p, sums);
  }
}

void product_tiles(const TrainingProductArgs& args, float* sums, int64_t begin, int64_t end) {
  if (args.type == Scalar::f32) return product_tiles_typed<float, float>(args, sums, begin, end);
  args.out_type == Scalar::f32 ? product_tiles_typed<BF16, float>(args, sums, begin, end)
                               : product_tiles_typed<BF16, BF16>(args, sums, begin, end);
}

constexpr TrainingProductKernels training_product_kernels = {
    kPanel, kRowTile, pack_operand, product_workspace, product_tiles,
};
