// Products of u8 activations and s8 weights with everything around them in one visit of the rows:
// [LayerNorm ->] quantise -> product -> dequantise, bias [, GELU -> quantise -> product] [, +
// residual]. Included by int8_kernels.cpp.
//
// A pass takes up to kMostRows rows. Their factors stay in the second-level cache while the panels
// of weights go by, each panel used for every tile of rows. Sums stay in registers over the whole
// depth. With VNNI the product alone reaches 97 to 100 % of the peak on a Zen 5 core (1045 GOP/s)
// for every shape of DeiT, with 14 x 2 registers as well as with 6 x 4. Two columns read half of
// the weights per cycle that four do.
//
// Where factors are words (kWords), a tile's columns are widened once a pass, in a buffer of the
// range's. So weights keep the bytes, the layout and the one copy that all sets share. Two thirds
// of the time of widening was waiting for memory. The next columns are therefore prefetched, tile
// by tile, and a pass has more rows: DeiT-B's block took 0.90 of its time.

#if defined(__AVX512VNNI__)
constexpr int kTileRows = 14, kTileVectors = 2;  // 28 sums, 2 of weights, 1 of activations
constexpr int64_t kGroup = 14;                   // rows that threads take at a time
#elif defined(DEIT_SMMLA)
constexpr int kTileRows = 8, kTileVectors = 2;  // 16 squares of sums, 4 of rows, 2 of weights in 32
constexpr int64_t kGroup = 16;
#elif defined(DEIT_SDOT)
constexpr int kTileRows = 6, kTileVectors = 4;  // 24, 4 and 1
constexpr int64_t kGroup = 12;
#elif defined(DEIT_NEON)
constexpr int kTileRows = 4, kTileVectors = 4;  // 16, 4 and 1; the others hold products
constexpr int64_t kGroup = 16;
#elif defined(__AVXVNNI__)
constexpr int kTileRows = 6, kTileVectors = 2;  // 12, 2 and 1 of 16
constexpr int64_t kGroup = 12;
#else
constexpr int kTileRows = 4, kTileVectors = 2;  // 8, 2 and 1; what is left holds products
constexpr int64_t kGroup = 16;
#endif
constexpr int kTileColumns = kTileVectors * kWidth;  // 32, 16 or 8: a panel's part

// Elements of the fp32 hidden layer of one pass: 512 KB, half of a Zen 5 core's second-level cache.
// For words it is 112 rows of DeiT-B's. They go through the cache twice a pass; weights do so once.
constexpr int64_t kHiddenElements = kWords ? 112 * 3072 : 131072;
// With words an image of 197 rows is one pass.
constexpr int64_t kMostRows = (kWords ? 208 : 112) / kGroup * kGroup;

DEIT_INLINE int64_t padded(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct RowScale {
  float scale;   // x ~ scale * (q - zero)
  int32_t zero;  // less kOffset from quantise_row on
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

DEIT_INLINE RowScale quantise_row(const float* x, int64_t n, UnsignedFactor* q) {
  float inverse;
  RowScale scale = row_scale(x, n, inverse);
  const Vec factor = broadcast(inverse);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_factors(q + i, load(x + i) * factor, scale.zero);
  if (i < n) {
    UnsignedFactor last[kWidth];
    store_factors(last, load_first(x + i, static_cast<int>(n - i)) * factor, scale.zero);
    std::memcpy(q + i, last, static_cast<size_t>(n - i) * sizeof(UnsignedFactor));
  }
  // Their weights are zero.
  std::memset(q + n, 0, static_cast<size_t>(padded(n, 4) - n) * sizeof(UnsignedFactor));
  scale.zero -= kOffset;
  return scale;
}

// One register tile: kTileColumns channels of up to kTileRows rows.
struct Tile {
  const UnsignedFactor* a;
  int64_t lda;
  const RowScale* rows;
  const Factor* b;       // at the tile's first column in its panel
  int64_t steps;         // of kTerms terms
  const int32_t* sums;
  const float* scales;
  const float* bias;
  const float* const* residual;  // the rows', at the tile's first column; or null
  float* c;
  int64_t ldc;
  int columns;  // of them exist; at most kTileColumns
};

// kTerms factors, as one lane holds them.
DEIT_INLINE int32_t lane(const UnsignedFactor* p) {
  int32_t factors;
  std::memcpy(&factors, p, sizeof factors);
  return factors;
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

#if defined(DEIT_SMMLA)
#include "int8_smmla.inl"
#endif

template <int MR>
void product_tile(const Tile& t) {
  Ints sums[MR][kTileVectors];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
      sums[i][j] = multiply(broadcast_ints(-t.rows[i].zero), load_ints(t.sums + j * kWidth));
    }
  }
#if defined(DEIT_SMMLA)
  add_products(t, sums);
#else
  constexpr int64_t kColumns = kWords ? kTileColumns : kPanelColumns;  // of b
  const UnsignedFactor* a = t.a;
  const Factor* b = t.b;
  for (int64_t k = 0; k < t.steps; ++k, a += kTerms, b += kTerms * kColumns) {
    Ints weights[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) weights[j] = load_factors(b + kTerms * j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Ints factors = broadcast_ints(lane(a + i * t.lda));
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) sums[i][j] = dot(sums[i][j], factors, weights[j]);
    }
  }
#endif
#pragma GCC unroll 4
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
#elif defined(DEIT_SMMLA)
using Tiles = TileTable<1, 2, 3, 4, 5, 6, 7, 8>;
#elif defined(__AVXVNNI__) || defined(DEIT_SDOT)
using Tiles = TileTable<1, 2, 3, 4, 5, 6>;
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

// The columns of a tile: groups of four terms, [groups, 32, 4] -> [2 * groups, kTileColumns, 2].
DEIT_INLINE const Factor* widened(const int8_t* panel, int64_t groups, Factor* to) {
  constexpr int64_t kStep = 2 * kTileColumns;
  for (int64_t k = 0; k < groups; ++k, panel += 4 * kPanelColumns) {
    Factor* first = to + 2 * k * kStep;
    for (int64_t j = 0; j < kTileColumns; j += kWidth) {
      widen_factors(panel + 4 * j, first + 2 * j, first + kStep + 2 * j);
    }
  }
  return to;
}

// Where a tile's columns begin in the packed weights.
DEIT_INLINE int64_t column_start(int64_t n, int64_t groups) {
  return (n / kPanelColumns * groups * kPanelColumns + n % kPanelColumns) * 4;
}

// c[count, features] of one pass; `residual` holds the rows' addresses, or is null.
void product(const Int8Weight& weight, const UnsignedFactor* a, int64_t lda, Factor* columns,
             const RowScale* rows, int64_t count, const float* const* residual, bool gelu, float* c,
             int64_t ldc) {
  const int64_t groups = padded(weight.depth, 4) / 4;
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  const float* shifted[kTileRows];
  for (int64_t n = 0; n < weight.features; n += kTileColumns) {
    Tile t{};
    t.lda = lda;
    const int8_t* packed = weight.packed + column_start(n, groups);
    if constexpr (kWords) {
      t.b = widened(packed, groups, columns);
    } else {
      t.b = reinterpret_cast<const Factor*>(packed);
    }
    t.steps = groups * 4 / kTerms;
    t.sums = weight.sums + n;
    t.scales = weight.scales + n;
    t.bias = weight.bias + n;
    t.residual = residual ? shifted : nullptr;
    t.ldc = ldc;
    const int64_t left = weight.features - n;
    t.columns = static_cast<int>(left < kTileColumns ? left : kTileColumns);
    const int8_t* next = weight.packed + column_start(n + kTileColumns, groups);
    const int64_t ahead = kWords && left > kTileColumns ? groups : 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal heights, or one fewer
      const int64_t first = tile * count / tiles, end = (tile + 1) * count / tiles;
      for (int64_t k = tile * ahead / tiles; k < (tile + 1) * ahead / tiles; ++k) {
        __builtin_prefetch(next + k * 4 * kPanelColumns);
      }
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
  int64_t stride;  // of a row of factors
  int64_t hidden_stride;
  float* normalised;          // one row
  float* hidden;              // [rows, hidden_stride]
  Factor* columns;            // of one tile of weights, where they are widened
  UnsignedFactor* quantised;  // [rows, stride]: of x, then of the hidden layer
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
  constexpr int64_t kSize = sizeof(UnsignedFactor);
  const int64_t bytes = padded(deepest * kSize, 64);
  w.stride = (bytes + (bytes % 1024 == 0 ? 64 : 0)) / kSize;
  const int64_t rows = two ? kHiddenElements / w.hidden_stride / kGroup * kGroup : kMostRows;
  w.rows = rows < kGroup ? kGroup : rows > kMostRows ? kMostRows : rows;
  const int64_t columns = kWords ? padded(deepest, 4) * kTileColumns : 0;
  const int64_t floats = padded(args.first.depth, 16) + w.rows * w.hidden_stride;
  w.bytes = static_cast<size_t>(floats) * sizeof(float) +
            static_cast<size_t>(columns + w.rows * w.stride) * sizeof(Factor);
  if (start) {
    w.normalised = static_cast<float*>(start);
    w.hidden = w.normalised + padded(args.first.depth, 16);
    w.columns = reinterpret_cast<Factor*>(w.hidden + w.rows * w.hidden_stride);
    w.quantised = reinterpret_cast<UnsignedFactor*>(w.columns + columns);
  }
  return w;
}

void quantise_inputs(const Int8Args& args, const Int8Workspace& w, int64_t begin, int64_t count,
                     RowScale* scales) {
  const float* x = static_cast<const float*>(args.x.data);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = x + row_offset(args.x, begin + i);
    if (args.norm.weight) {
      normalise(row, mean_of(row, args.norm.channels), args.norm, w.normalised);
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
      product(args.first, w.quantised, w.stride, w.columns, scales, count, nullptr, true, w.hidden,
              w.hidden_stride);
      for (int64_t i = 0; i < count; ++i) {
        scales[i] = quantise_row(w.hidden + i * w.hidden_stride, args.second.depth,
                                 w.quantised + i * w.stride);
      }
    }
    for (int64_t i = 0; residual && i < count; ++i) {
      residual_rows[i] = residual + row_offset(args.residual, row + i);
    }
    product(last, w.quantised, w.stride, w.columns, scales, count,
            residual ? residual_rows : nullptr, args.gelu && !two, args.out + row * last.features,
            last.features);
  }
}

size_t int8_workspace(const Int8Args& args) { return lay_out(args, nullptr).bytes; }
