// The fp32 products of training, forward and backward. Included by kernels.cpp.
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

void pack_operand(const PackArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first_column = panel * kPanel, left = args.width - first_column;
    float* to = args.panels + first_column * args.depth;
    if (args.transposed) {
      pack_keys(args.b + first_column * args.ldb, args.ldb, left < kPanel ? left : kPanel,
                args.depth, to);
    } else {
      pack_columns<kPanel>(args.b + first_column, args.ldb, args.depth, left, to);
    }
  }
}

// The epilogue on `sums`, [rows, columns] at row stride kPanel, of the product's columns from
// `column`.
DEIT_INLINE void finish(const TrainingProductArgs& p, const float* sums, int64_t column,
                        int64_t columns) {
  for (int64_t row = 0; row < p.rows; ++row, sums += kPanel) {
    const int64_t sample = p.keep ? (p.first_row + row) / p.rows_per_sample : 0;
    const Vec kept = broadcast(p.keep ? p.keep[sample] : 1.0f);
    const int64_t at = row * p.width + column;
    each_vector(columns, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      Vec y = load(sums + j);
      if (p.hidden) {
        const Vec hidden = load_lanes(p.hidden + at + j, lanes);
        const Activated found = activate_with_slope(hidden, p.activation);
        if (p.activated) store_lanes(p.activated + at + j, found.value, lanes);
        return store_lanes(p.out + at + j, y * found.slope, lanes);
      }
      if (p.bias) y = y + load_lanes(p.bias + column + j, lanes);
      if (p.affine) store_lanes(p.affine + at + j, y, lanes);
      if (p.activation != Activation::none) y = activate_with_slope(y, p.activation).value;
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
      multiply<float, false>(p.a + k, p.lda, panel + k * kPanel, kPanel, p.rows, chain,
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

constexpr TrainingProductKernels training_product_kernels = {
    kPanel, kRowTile, pack_operand, product_workspace, product_tiles,
};
