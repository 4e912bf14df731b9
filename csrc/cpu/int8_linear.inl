// Products of u8 activations and s8 weights with everything around them in one visit of the rows:
// [LayerNorm ->] quantise -> product -> dequantise, bias [, GELU -> quantise -> product] [, +
// residual]. Included by int8_kernels.cpp.
//
// A pass takes up to 112 rows. Their bytes stay in the second-level cache while the panels of
// weights go by, each panel used for every tile of rows. Sums stay in registers over the whole
// depth. The product alone reaches 97 to 100 % of this instruction set's peak on a Zen 5 core (1045
// GOP/s) for every shape of DeiT, with 14 x 2 registers as well as with 6 x 4. Two columns read
// half of the weights per cycle that four do.

#if defined(__AVX512VNNI__)
constexpr int kTileRows = 14, kTileVectors = 2;  // 28 sums, 2 of weights, 1 of activations
#else
constexpr int kTileRows = 4, kTileVectors = 2;  // 8 sums, 3 operands, 5 for what stands for VNNI
#endif
constexpr int kTileColumns = kTileVectors * kWidth;  // 32, 16 or 8: a panel's part
constexpr int64_t kGroup = 14;                       // rows that threads take at a time

// Elements of the fp32 hidden layer of one pass: 512 KB, half of a Zen 5 core's second-level cache.
constexpr int64_t kHiddenElements = 131072;
constexpr int64_t kMostRows = 8 * kGroup;

DEIT_INLINE int64_t padded(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct RowScale {
  float scale;   // x ~ scale * (q - zero)
  int32_t zero;
};

// What a row spans, 0 included; `poison` is NaN from the first NaN or infinity on, else zero.
struct Range {
  Vec low, high, poison;
};

DEIT_INLINE void include(Vec a, Range& range) {
  range.low = min(a, range.low);
  range.high = max(a, range.high);
  range.poison = fma(a, broadcast(0.0f), range.poison);
}

// The row's range over 255 steps. NaN or an infinity anywhere makes the scale NaN, and with it the
// row's every output.
DEIT_INLINE RowScale row_scale(const float* x, int64_t n, float& inverse) {
  Range part[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) include(load(x + i + c * kWidth), part[c]);
  }
  for (; i + kWidth <= n; i += kWidth) include(load(x + i), part[0]);
  if (i < n) include(load_first(x + i, static_cast<int>(n - i)), part[1]);
  const Vec low = min(min(part[0].low, part[1].low), min(part[2].low, part[3].low));
  const Vec high = max(max(part[0].high, part[1].high), max(part[2].high, part[3].high));
  const Vec poison[kChains] = {part[0].poison, part[1].poison, part[2].poison, part[3].poison};
  const float least = -largest(broadcast(0.0f) - low);
  const float scale = (largest(high) - least) / 255.0f + sum(joined(poison));
  inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;  // below, 1 / scale may overflow: all zeros
  const float zero = -least * inverse;
  return {scale, zero < 255.0f ? static_cast<int32_t>(__builtin_nearbyintf(zero)) : 255};
}

DEIT_INLINE RowScale quantise_row(const float* x, int64_t n, uint8_t* q) {
  float inverse;
  const RowScale scale = row_scale(x, n, inverse);
  const Vec factor = broadcast(inverse);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_bytes(q + i, load(x + i) * factor, scale.zero);
  if (i < n) {
    uint8_t last[kWidth];
    store_bytes(last, load_first(x + i, static_cast<int>(n - i)) * factor, scale.zero);
    std::memcpy(q + i, last, static_cast<size_t>(n - i));
  }
  std::memset(q + n, 0, static_cast<size_t>(padded(n, 4) - n));  // their weights are zero
  return scale;
}

// One register tile: kTileColumns channels of up to kTileRows rows.
struct Tile {
  const uint8_t* a;
  int64_t lda;
  const RowScale* rows;
  const int8_t* b;       // at the tile's first column in its panel
  int64_t groups;        // of four terms
  const int32_t* sums;
  const float* scales;
  const float* bias;
  const float* const* residual;  // the rows', at the tile's first column; or null
  float* c;
  int64_t ldc;
  int columns;  // of them exist; at most kTileColumns
};

DEIT_INLINE int32_t four_bytes(const uint8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return bytes;
}

DEIT_INLINE Vec load_upto(const float* p, int left) {
  return left >= kWidth ? load(p) : load_first(p, left);
}
DEIT_INLINE void store_upto(float* p, Vec a, int left) {
  if (left >= kWidth) {
    store(p, a);
  } else {
    store_first(p, a, left);
  }
}

template <int MR>
void product_tile(const Tile& t) {
  Ints sums[MR][kTileVectors];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      sums[i][j] = multiply(broadcast_ints(-t.rows[i].zero), load_ints(t.sums + j * kWidth));
    }
  }
  const uint8_t* a = t.a;
  const int8_t* b = t.b;
  for (int64_t k = 0; k < t.groups; ++k, a += 4, b += 4 * kPanelColumns) {
    Ints weights[kTileVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) weights[j] = load_bytes(b + 4 * j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Ints bytes = broadcast_ints(four_bytes(a + i * t.lda));
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j) sums[i][j] = dot4(sums[i][j], bytes, weights[j]);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kTileVectors; ++j) {
    const int left = t.columns - j * kWidth;
    if (left <= 0) break;
    const Vec scales = load(t.scales + j * kWidth), bias = load(t.bias + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      Vec y = fma(to_floats(sums[i][j]), scales * broadcast(t.rows[i].scale), bias);
      if (t.residual) y = y + load_upto(t.residual[i] + j * kWidth, left);
      store_upto(t.c + i * t.ldc + j * kWidth, y, left);
    }
  }
}

using TileKernel = void (*)(const Tile&);

template <int... MR>
struct TileTable {
  static constexpr TileKernel kernels[] = {product_tile<MR>...};
};
#if defined(__AVX512VNNI__)
using Tiles = TileTable<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
using Tiles = TileTable<1, 2, 3, 4>;
#endif

void gelu_tile(float* c, int64_t ldc, int rows, int columns) {
  for (int i = 0; i < rows; ++i, c += ldc) {
    for (int j = 0; j < columns; j += kWidth) {
      store_upto(c + j, coarse_gelu(load_upto(c + j, columns - j)), columns - j);
    }
  }
}

// c[count, features] of one pass; `residual` holds the rows' addresses, or is null.
void product(const Int8Weight& weight, const uint8_t* a, int64_t lda, const RowScale* rows,
             int64_t count, const float* const* residual, bool gelu, float* c, int64_t ldc) {
  const int64_t groups = padded(weight.depth, 4) / 4;
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  const float* shifted[kTileRows];
  for (int64_t n = 0; n < weight.features; n += kTileColumns) {
    const int64_t panel = n / kPanelColumns, within = n % kPanelColumns;
    Tile t{};
    t.lda = lda;
    t.b = weight.packed + (panel * groups * kPanelColumns + within) * 4;
    t.groups = groups;
    t.sums = weight.sums + n;
    t.scales = weight.scales + n;
    t.bias = weight.bias + n;
    t.residual = residual ? shifted : nullptr;
    t.ldc = ldc;
    const int64_t left = weight.features - n;
    t.columns = static_cast<int>(left < kTileColumns ? left : kTileColumns);
    for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal heights, or one fewer
      const int64_t first = tile * count / tiles, end = (tile + 1) * count / tiles;
      t.a = a + first * lda;
      t.rows = rows + first;
      t.c = c + first * ldc + n;
      for (int64_t i = first; residual && i < end; ++i) shifted[i - first] = residual[i] + n;
      Tiles::kernels[end - first - 1](t);
      if (gelu) gelu_tile(t.c, ldc, static_cast<int>(end - first), t.columns);
    }
  }
}

// Where the pieces of a range's workspace lie; all but `bytes` are null when only measuring.
struct Int8Workspace {
  int64_t rows;    // of one pass
  int64_t stride;  // of a row of bytes
  int64_t hidden_stride;
  float* normalised;      // one row
  float* hidden;          // [rows, hidden_stride]
  uint8_t* quantised;     // [rows, stride]: of x, then of the hidden layer
  size_t bytes;
};

DEIT_INLINE Int8Workspace lay_out(const Int8Args& args, void* start) {
  const bool two = args.second.packed != nullptr;
  Int8Workspace w{};
  w.hidden_stride = two ? padded(args.first.features, 16) : 0;
  const int64_t deepest = two && args.second.depth > args.first.depth ? args.second.depth
                                                                      : args.first.depth;
  // A multiple of 1024 bytes gets a cache line more: rows 4096 bytes apart, 14 of them, would fall
  // into one set of a cache.
  w.stride = padded(deepest, 64) + (padded(deepest, 64) % 1024 == 0 ? 64 : 0);
  int64_t rows = two ? kHiddenElements / w.hidden_stride / kGroup * kGroup : kMostRows;
  w.rows = rows < kGroup ? kGroup : rows > kMostRows ? kMostRows : rows;
  const int64_t floats = padded(args.first.depth, 16) + w.rows * w.hidden_stride;
  w.bytes = static_cast<size_t>(floats) * sizeof(float) + static_cast<size_t>(w.rows * w.stride);
  if (start) {
    w.normalised = static_cast<float*>(start);
    w.hidden = w.normalised + padded(args.first.depth, 16);
    w.quantised = reinterpret_cast<uint8_t*>(w.hidden + w.rows * w.hidden_stride);
  }
  return w;
}

void quantise_inputs(const Int8Args& args, const Int8Workspace& w, int64_t begin, int64_t count,
                     RowScale* scales) {
  const float* x = static_cast<const float*>(args.x.data);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = x + row_offset(args.x, begin + i);
    if (args.norm.weight) {
      normalise(row, args.norm, w.normalised);
      row = w.normalised;
    }
    scales[i] = quantise_row(row, args.first.depth, w.quantised + i * w.stride);
  }
}

void run_int8(const Int8Args& args, void* workspace, int64_t begin_group, int64_t end_group) {
  const Int8Workspace w = lay_out(args, workspace);
  const bool two = args.second.packed != nullptr;
  const Int8Weight& last = two ? args.second : args.first;
  const float* residual = static_cast<const float*>(args.residual.data);
  const int64_t end = end_group * kGroup < args.rows ? end_group * kGroup : args.rows;
  RowScale scales[kMostRows];
  const float* residual_rows[kMostRows];
  for (int64_t row = begin_group * kGroup; row < end; row += w.rows) {
    const int64_t count = end - row < w.rows ? end - row : w.rows;
    quantise_inputs(args, w, row, count, scales);
    if (two) {
      product(args.first, w.quantised, w.stride, scales, count, nullptr, true, w.hidden,
              w.hidden_stride);
      for (int64_t i = 0; i < count; ++i) {
        scales[i] = quantise_row(w.hidden + i * w.hidden_stride, args.second.depth,
                                 w.quantised + i * w.stride);
      }
    }
    for (int64_t i = 0; residual && i < count; ++i) {
      residual_rows[i] = residual + row_offset(args.residual, row + i);
    }
    product(last, w.quantised, w.stride, scales, count, residual ? residual_rows : nullptr,
            args.gelu && !two, args.out + row * last.features, last.features);
  }
}

size_t int8_workspace(const Int8Args& args) { return lay_out(args, nullptr).bytes; }
