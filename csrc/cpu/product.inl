// Products of fp32 matrices with their epilogue: out = residual + keep * gamma * act(x wT + bias).
// Included by kernels.cpp.
//
// A task is a block of rows times one panel of kCols output channels. Panel by panel and kDepth
// inputs at a time, the weights are transposed into a buffer that stays in the second-level
// cache while all rows of the block pass by it: so weights are packed once a call, nothing of them
// is kept between calls, and no change of a weight can be missed. At 197 rows a packed element
// serves 197 multiply-adds.
//
// The inner loop keeps kRows x kVectors sums in registers. One step of it loads kVectors vectors
// of weights and broadcasts kRows inputs: 11 loads for 24 multiply-adds with AVX-512, where two of
// either fit a cycle. Every output is the same sequence of operations wherever a block of rows or
// a thread's range begins.

namespace products {

#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;  // 24 sums, 3 weights and an input in 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;  // 12, 2 and 1 in 16
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int kCols = kVectors * kWidth;
constexpr int64_t kDepth = 384;  // a packed panel is 72 KB with AVX-512
constexpr int64_t kMaxRowBlock = 800;

DEIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// x wT over `depth` inputs, on top of what the sums hold.
template <int R>
DEIT_INLINE void multiply(const float* x, int64_t stride, const float* panel, int64_t depth,
                          Vec (&sums)[R][kVectors]) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec weights[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) weights[v] = load(panel + k * kCols + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec input = broadcast(x[r * stride + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(input, weights[v], sums[r][v]);
    }
  }
}

// One panel's columns of a matrix or vector, the last of them maybe past its end.
template <bool kWhole>
DEIT_INLINE Vec load_columns(const float* p, int v, int64_t columns) {
  const int64_t left = columns - v * kWidth;
  if (kWhole || left >= kWidth) return load(p + v * kWidth);
  return left > 0 ? load_first(p + v * kWidth, static_cast<int>(left)) : broadcast(0.0f);
}

template <bool kWhole>
DEIT_INLINE void store_columns(float* p, int v, Vec a, int64_t columns) {
  const int64_t left = columns - v * kWidth;
  if (kWhole || left >= kWidth) return store(p + v * kWidth, a);
  if (left > 0) store_first(p + v * kWidth, a, static_cast<int>(left));
}

struct Tile {
  int64_t row, rows;        // of the output
  int64_t column, columns;  // the columns from here to the panel's end or the output's
  int64_t k, depth;         // the inputs of this step
};

// R rows of one panel over one step of inputs. Sums of an unfinished row wait in `out`.
template <int R, bool kWhole>
void multiply_rows(const ProductArgs& args, const float* panel, const Tile& tile) {
  Vec sums[R][kVectors];
  float* out = args.out + tile.row * args.width + tile.column;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = tile.k == 0 ? broadcast(0.0f)
                               : load_columns<kWhole>(out + r * args.width, v, tile.columns);
    }
  }
  multiply(args.x + tile.row * args.depth + tile.k, args.depth, panel, tile.depth, sums);
  const bool biased = args.bias != nullptr && tile.k + tile.depth == args.depth;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Vec bias = biased ? load_columns<kWhole>(args.bias + tile.column, v, tile.columns)
                            : broadcast(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store_columns<kWhole>(out + r * args.width, v, sums[r][v] + bias, tile.columns);
    }
  }
}

using MultiplyRows = void (*)(const ProductArgs&, const float*, const Tile&);

// The function for a tile of up to kRows rows, whole or partial in its columns.
template <bool kWhole, int R = kRows>
DEIT_INLINE MultiplyRows multiply_rows_for(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_rows_for<kWhole, R - 1>(rows);
  }
  return multiply_rows<R, kWhole>;
}

// What follows the biased sum, in place: the tile has just been written and is in the first-level
// cache, so this costs 24 loads and stores against the 24 * depth multiply-adds before them.
template <Activation kActivation, bool kWhole>
void finish_rows(const ProductArgs& args, const Tile& tile) {
  const float* gamma = args.gamma ? args.gamma + tile.column : nullptr;
  for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
    const int64_t start = row * args.width + tile.column;
    float* out = args.out + start;
    const float* residual = args.residual ? args.residual + start : nullptr;
    const float keep = args.keep ? args.keep[(args.first_row + row) / args.rows_per_sample] : 1.0f;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec y = load_columns<kWhole>(out, v, tile.columns);
      if (kActivation == Activation::gelu) y = gelu(y);
      if (kActivation == Activation::gelu_tanh) y = gelu_tanh(y);
      if (gamma) y = y * load_columns<kWhole>(gamma, v, tile.columns);
      if (args.keep) y = y * broadcast(keep);
      if (residual) y = load_columns<kWhole>(residual, v, tile.columns) + y;
      store_columns<kWhole>(out, v, y, tile.columns);
    }
  }
}

template <bool kWhole>
DEIT_INLINE void finish(const ProductArgs& args, const Tile& tile) {
  switch (args.activation) {
    case Activation::none: return finish_rows<Activation::none, kWhole>(args, tile);
    case Activation::gelu: return finish_rows<Activation::gelu, kWhole>(args, tile);
    case Activation::gelu_tanh: return finish_rows<Activation::gelu_tanh, kWhole>(args, tile);
  }
}

// Transposes kWidth weights of each of `channels` channels; zeros for channels past the last.
template <bool kWhole>
DEIT_INLINE void pack_block(const float* weight, int64_t stride, int64_t channels, int count,
                            float* panel) {
  Vec block[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (kWhole) {
      block[i] = load(weight + i * stride);
    } else {
      const float* row = weight + i * stride;
      block[i] = i >= channels    ? broadcast(0.0f)
                 : count < kWidth ? load_first(row, count)
                                  : load(row);
    }
  }
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) store(panel + i * kCols, block[i]);
}

// [kCols, depth] of the weights -> [depth, kCols]. Channel group by channel group: 16 streams of
// memory at a time are enough where rows lie a multiple of 4 KB apart.
void pack_panel(const float* weight, int64_t stride, int64_t columns, int64_t depth,
                float* panel) {
  for (int v = 0; v < kVectors; ++v) {
    const float* first = weight + v * kWidth * stride;
    const int64_t channels = columns - v * kWidth;
    for (int64_t k = 0; k < depth; k += kWidth) {
      float* out = panel + k * kCols + v * kWidth;
      if (channels >= kWidth && depth - k >= kWidth) {
        pack_block<true>(first + k, stride, channels, kWidth, out);
      } else {
        pack_block<false>(first + k, stride, channels,
                          static_cast<int>(smaller(kWidth, depth - k)), out);
      }
    }
  }
}

// Weights on their way from memory while the rows before them are multiplied, a few lines a tile.
class Prefetch {
 public:
  Prefetch(const float* weight, int64_t stride, int64_t rows, int64_t depth, int64_t tiles)
      : weight_(weight), stride_(stride), depth_(depth), rows_(weight ? rows : 0),
        lines_((rows * ((depth + 15) / 16) + tiles - 1) / tiles) {}

  DEIT_INLINE void next_lines() {
    for (int64_t i = 0; i < lines_ && row_ < rows_; ++i) {
      __builtin_prefetch(weight_ + row_ * stride_ + k_, 0, 2);
      k_ += 16;
      if (k_ >= depth_) {
        k_ = 0;
        ++row_;
      }
    }
  }

 private:
  const float* weight_;
  int64_t stride_, depth_, rows_, lines_;
  int64_t row_ = 0, k_ = 0;
};

// One panel's channels for a block of rows. `another`: this thread goes on to the next panel.
void multiply_panel(const ProductArgs& args, float* panel, int64_t first_row, int64_t column,
                    bool another) {
  Tile tile{};
  tile.column = column;
  tile.columns = smaller(kCols, args.width - column);
  const int64_t end = smaller(args.rows, first_row + args.row_block);
  const int64_t tiles = (end - first_row + kRows - 1) / kRows;
  const bool whole = tile.columns == kCols;
  const bool finishing = args.activation != Activation::none || args.gamma || args.keep || args.residual;
  for (tile.k = 0; tile.k < args.depth; tile.k += kDepth) {
    tile.depth = smaller(kDepth, args.depth - tile.k);
    const float* weight = args.weight + column * args.weight_stride + tile.k;
    pack_panel(weight, args.weight_stride, tile.columns, tile.depth, panel);
    const bool more = tile.k + tile.depth < args.depth;
    const int64_t next_column = column + kCols < args.width ? column + kCols : 0;
    const float* next = more      ? weight + kDepth
                        : another ? args.weight + next_column * args.weight_stride
                                  : nullptr;
    const int64_t next_depth = smaller(kDepth, more ? args.depth - tile.k - kDepth : args.depth);
    const int64_t next_rows = smaller(kCols, args.width - (more ? column : next_column));
    Prefetch prefetch(next, args.weight_stride, next_rows, next_depth, tiles);
    for (tile.row = first_row; tile.row < end; tile.row += kRows) {
      prefetch.next_lines();
      tile.rows = smaller(kRows, end - tile.row);
      const MultiplyRows run = whole ? multiply_rows_for<true>(tile.rows)
                                     : multiply_rows_for<false>(tile.rows);
      run(args, panel, tile);
      if (finishing && !more) whole ? finish<true>(args, tile) : finish<false>(args, tile);
    }
  }
}

void plan_product(ProductArgs& args, int64_t threads) {
  args.panels = (args.width + kCols - 1) / kCols;
  // Every block of rows packs the weights again, 1 % of the time at 800 rows; and every thread
  // is to have two tasks, so that none waits for another's last.
  const int64_t by_size = (args.rows + kMaxRowBlock - 1) / kMaxRowBlock;
  const int64_t by_threads = threads < 2 ? 1 : (2 * threads + args.panels - 1) / args.panels;
  const int64_t blocks = by_size > by_threads ? by_size : by_threads;
  const int64_t rows = (args.rows + blocks - 1) / blocks;
  args.row_block = (rows + kRows - 1) / kRows * kRows;
  args.tasks = (args.rows + args.row_block - 1) / args.row_block * args.panels;
}

size_t product_workspace(const ProductArgs&) { return static_cast<size_t>(kDepth * kCols); }

void product(const ProductArgs& args, float* panel, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    multiply_panel(args, panel, task / args.panels * args.row_block, task % args.panels * kCols,
                   task + 1 < end);
  }
}

}  // namespace products
