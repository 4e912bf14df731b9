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
constexpr int64_t kRowTile = 96;  // rows of a task: a panel's block is read 16 times from L1

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

// The epilogue on `sums`, [rows, columns] at row stride kPanel, of the product's columns from
// `column`.
template <class T, class Out>
DEIT_INLINE void finish(const TrainingProductArgs& p, const float* sums, int64_t column,
                        int64_t columns) {
  for (int64_t row = 0; row < p.rows; ++row, sums += kPanel) {
    const int64_t sample = p.keep ? (p.first_row + row) / p.rows_per_sample : 0;
    const Vec kept = broadcast(p.keep ? p.keep[sample] : 1.0f);
    const int64_t at = row * p.width + column;
    Out* out = static_cast<Out*>(p.out) + at;
    each_vector(columns, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      Vec y = load(sums + j);
      if (p.hidden) {
        const Vec hidden = load_lanes(static_cast<const T*>(p.hidden) + at + j, lanes);
        const Activated found = activate_with_slope(hidden, p.activation);
        if (p.activated) store_lanes(static_cast<T*>(p.activated) + at + j, found.value, lanes);
        return store_lanes(out + j, y * found.slope, lanes);
      }
      if (p.bias) y = y + load_lanes(p.bias + column + j, lanes);
      if (p.affine) store_lanes(static_cast<T*>(p.affine) + at + j, y, lanes);
      if (p.activation != Activation::none) y = activated_by<T>(y, p.activation);
      if (p.gamma) y = y * load_lanes(p.gamma + column + j, lanes);
      if (p.keep) y = y * kept;
      if (p.residual) y = load_lanes(static_cast<const Out*>(p.residual) + at + j, lanes) + y;
      store_lanes(out + j, y, lanes);
    });
  }
}

// The whole of `p`, which has kRowTile rows at most.
template <class T, class Out>
void product_tile(const TrainingProductArgs& p, float* sums) {
  for (int64_t column = 0; column < p.width; column += kPanel) {
    const int64_t left = p.width - column, columns = left < kPanel ? left : kPanel;
    const float* panel = p.panels + column * p.depth;
    for (int64_t k = 0; k < p.depth; k += kLayerChain) {
      const int64_t chain = p.depth - k < kLayerChain ? p.depth - k : kLayerChain;
      multiply<T, false>(p.a + k, p.lda, panel + k * kPanel, kPanel, p.rows, chain,
                         vectors_of(columns), k > 0, sums, kPanel);
    }
    finish<T, Out>(p, sums, column, columns);
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
