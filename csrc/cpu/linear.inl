// The products of inference and what follows them: out = residual + keep * gamma * act(x wT +
// bias). Included by kernels.cpp.
//
// A task is a block of rows times one panel of kCols output channels. kDepth words of input at a
// time, the panel's weights are transposed into a buffer that stays in the first-level cache
// while all rows of the block pass by it. So weights are packed in the call, and nothing of them
// is kept after it: no change of a weight can be missed and no memory is held. A packed word
// serves 2 * 197 operations at the least batch of a DeiT; prefetching the next weights meanwhile
// is worth 0 to 11 % there. Where a call multiplies one image after another by the same weights
// (vit_block.inl), they are packed once before.
//
// The inner loop keeps kRows x kVectors sums in registers. One step of it loads kVectors vectors
// of weights and broadcasts kRows inputs: 11 loads for 24 multiply-adds with AVX-512, where two of
// either fit a cycle. Every output is the same sequence of operations wherever a block of rows or
// a thread's range begins.
//
// A word is one fp32 input, or two of bf16, which one instruction multiplies and adds in fp32.
//
// Training's products (linear_training.inl) have a driver of their own on the same micro-kernel,
// `multiply_block`; what that is worth to each stands there.

namespace products {

#if defined(__AVX512F__) || defined(DEIT_NEON)
constexpr int kRows = 8, kVectors = 3;  // 24 sums, 3 weights and an input in 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;  // 12, 2 and 1 in 16
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int kCols = kVectors * kWidth;
// Sums run over kDepth words and are then added up: in one chain, the error at 3072 inputs was 3.5
// times that of PyTorch's product. A packed step is 36 KB with AVX-512, which leaves 12 KB of the
// first-level cache to the inputs. DeiT's depths are multiples of kDepth, and kDepth is a multiple
// of kCols.
constexpr int64_t kDepth = 192;
constexpr int64_t kDepthUnit = 48;  // steps are whole panels of `feed_forward`'s hidden layer
static_assert(kDepth % kDepthUnit == 0 && kDepthUnit % kCols == 0, "a step is of whole panels");
constexpr int64_t kMaxRowBlock = 800;

DEIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The words of one step. Steps are of even length: at a depth of 196, chains of 192 and
// 4 words had 1.4 times the error of PyTorch's product, which takes halves.
DEIT_INLINE int64_t step_of(int64_t depth) {
  if (depth <= kDepth) return kDepth;
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  return (depth + steps * kDepthUnit - 1) / (steps * kDepthUnit) * kDepthUnit;
}

struct Tile {
  int64_t row, rows;        // of the output
  int64_t column, columns;  // the columns from here to the panel's end or the output's
  int64_t k, depth;         // the words of this step
  bool first;               // the sums begin with this step
};

// R rows of one panel over one step of inputs: the first step writes `sums` [R, kCols], the
// others add to it.
template <class T, int R>
void multiply_rows(const ProductArgs& args, const float* panel, const Tile& tile, float* sums) {
  const float* x = static_cast<const float*>(args.x) + tile.row * args.depth + tile.k;
  multiply_block<T, false, R, kVectors>(x, args.depth, panel, kCols, tile.depth, !tile.first, sums,
                                        kCols);
}

using MultiplyRows = void (*)(const ProductArgs&, const float*, const Tile&, float*);

// The function for a tile of up to kRows rows.
template <class T, int R = kRows>
DEIT_INLINE MultiplyRows multiply_rows_for(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_rows_for<T, R - 1>(rows);
  }
  return multiply_rows<T, R>;
}

// Vector v of one panel's columns of a row; the last panel may end past the row.
template <bool kWhole, class T>
DEIT_INLINE Vec load_columns(const T* p, int v, int64_t columns) {
  const int64_t left = columns - v * kWidth;
  if (kWhole || left >= kWidth) return load(p + v * kWidth);
  return left > 0 ? load_first(p + v * kWidth, static_cast<int>(left)) : broadcast(0.0f);
}

template <bool kWhole, class T>
DEIT_INLINE void store_columns(T* p, int v, Vec a, int64_t columns) {
  const int64_t left = columns - v * kWidth;
  if (kWhole || left >= kWidth) return store(p + v * kWidth, a);
  if (left > 0) store_first(p + v * kWidth, a, static_cast<int>(left));
}

// Sums of a tile, which are in the first-level cache, become outputs.
template <class Out, Activation kActivation, bool kWhole>
void finish_rows(const ProductArgs& args, const Tile& tile, const float* sums) {
  const float* bias = args.bias ? args.bias + tile.column : nullptr;
  const float* gamma = args.gamma ? args.gamma + tile.column : nullptr;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row + r, start = row * args.width + tile.column;
    Out* out = static_cast<Out*>(args.out) + start;
    const Out* residual = args.residual ? static_cast<const Out*>(args.residual) + start : nullptr;
    const float keep = args.keep ? args.keep[(args.first_row + row) / args.rows_per_sample] : 1.0f;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec y = load(sums + r * kCols + v * kWidth);
      if (bias) y = y + load_columns<kWhole>(bias, v, tile.columns);
      y = activate<kActivation>(y);
      if (gamma) y = y * load_columns<kWhole>(gamma, v, tile.columns);
      if (args.keep) y = y * broadcast(keep);
      if (residual) y = load_columns<kWhole>(residual, v, tile.columns) + y;
      store_columns<kWhole>(out, v, y, tile.columns);
    }
  }
}

template <class Out, bool kWhole>
DEIT_INLINE void finish_as(const ProductArgs& args, const Tile& tile, const float* sums) {
  switch (args.activation) {
    case Activation::none: return finish_rows<Out, Activation::none, kWhole>(args, tile, sums);
    case Activation::gelu: return finish_rows<Out, Activation::gelu, kWhole>(args, tile, sums);
    case Activation::gelu_tanh:
      return finish_rows<Out, Activation::gelu_tanh, kWhole>(args, tile, sums);
    case Activation::quick_gelu:
      return finish_rows<Out, Activation::quick_gelu, kWhole>(args, tile, sums);
    case Activation::silu: return finish_rows<Out, Activation::silu, kWhole>(args, tile, sums);
  }
}

DEIT_INLINE void finish(const ProductArgs& args, const Tile& tile, const float* sums) {
  const bool whole = tile.columns == kCols;
  if (args.out_type == Scalar::bf16) {
    return whole ? finish_as<BF16, true>(args, tile, sums)
                 : finish_as<BF16, false>(args, tile, sums);
  }
  whole ? finish_as<float, true>(args, tile, sums) : finish_as<float, false>(args, tile, sums);
}

// Transposes kWidth words of each of kWidth channels; zeros for channels past the last.
template <bool kWhole>
DEIT_INLINE void pack_block(const float* weight, int64_t stride, int64_t channels, int count,
                            float* panel) {
  Vec block[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    const float* row = weight + i * stride;
    if (kWhole) {
      block[i] = load(row);
    } else {
      block[i] = i >= channels    ? broadcast(0.0f)
                 : count < kWidth ? load_first(row, count)
                                  : load(row);
    }
  }
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (kWhole || i < count) store(panel + i * kCols, block[i]);
  }
}

// A column's weights. Where the weight lies in thirds, 16 columns that begin at a multiple of 16
// lie in one of them.
DEIT_INLINE const float* weights_of(const ProductArgs& args, int64_t column) {
  const void* from = args.weight;
  if (args.part) {
    const int64_t third = smaller(column / args.part, 2);
    if (third > 0) from = args.others[third - 1];
    column -= third * args.part;
  }
  return static_cast<const float*>(from) + column * args.depth;
}

// Columns from `column` on, words [k, k + depth): [kCols, depth] of the weights -> [depth, kCols].
// Channel group by channel group: 16 streams of memory at a time are enough where rows lie a
// multiple of 4 KB apart.
void pack_panel(const ProductArgs& args, int64_t column, int64_t k_first, int64_t columns,
                int64_t depth, float* panel) {
  static_assert(16 % kWidth == 0, "a group of channels lies in one third of the weight");
  const int64_t stride = args.depth;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t channels = columns - v * kWidth;
    // Nothing is read where there are no channels.
    const float* first = weights_of(args, channels > 0 ? column + v * kWidth : column) + k_first;
    for (int64_t k = 0; k < depth; k += kWidth) {
      float* out = panel + k * kCols + v * kWidth;
      const int count = static_cast<int>(smaller(kWidth, depth - k));
      if (channels >= kWidth && count == kWidth) {
        pack_block<true>(first + k, stride, channels, count, out);
      } else {
        pack_block<false>(first + k, stride, channels, count, out);
      }
    }
  }
}

// Weights on their way from memory while the rows before them are multiplied, some of their rows a
// tile: two instructions a line.
class Prefetch {
 public:
  Prefetch(const float* weight, int64_t stride, int64_t rows, int64_t depth, int64_t tiles)
      : weight_(weight), stride_(stride), depth_(depth), left_(weight ? rows : 0),
        each_((rows + tiles - 1) / tiles) {}

  DEIT_INLINE void next_rows() {
    for (int64_t row = smaller(each_, left_); row > 0; --row) {
      for (int64_t k = 0; k < depth_; k += kLine) __builtin_prefetch(weight_ + k);
      weight_ += stride_;
      --left_;
    }
  }

 private:
  const float* weight_;
  int64_t stride_, depth_, left_, each_;
};

DEIT_INLINE int64_t tiles_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

// The weights that follow those of `tile`: the panel's next step, or another panel's first.
Prefetch prefetch_next(const ProductArgs& args, const Tile& tile, int64_t tiles, bool another) {
  int64_t column = tile.column, k = tile.k + tile.depth;
  if (k == args.depth) {
    k = 0;
    column = column + kCols < args.width ? column + kCols : 0;
  }
  const float* weight = weights_of(args, column) + k;
  const bool any = k > 0 || another;
  return Prefetch(any ? weight : nullptr, args.depth, smaller(kCols, args.width - column),
                  smaller(step_of(args.depth), args.depth - k), tiles);
}

// The same of packed weights, whose steps lie one after another.
DEIT_INLINE Prefetch prefetch_packed(const float* next, int64_t depth, int64_t tiles) {
  const int64_t share = (depth * kCols + tiles - 1) / tiles;
  return Prefetch(next, share, tiles, share, tiles);
}

// Rows [begin, end) of one panel over one step of inputs; `last` steps end in the output.
// sums: [kRows, kCols] where one step is all, else [end - begin, kCols].
template <class T>
DEIT_INLINE void multiply_step(const ProductArgs& args, const float* panel, Tile tile,
                               int64_t begin, int64_t end, bool last, Prefetch prefetch,
                               float* sums) {
  const bool kept = !tile.first || !last;
  for (tile.row = begin; tile.row < end; tile.row += kRows) {
    prefetch.next_rows();
    tile.rows = smaller(kRows, end - tile.row);
    float* here = kept ? sums + (tile.row - begin) * kCols : sums;
    multiply_rows_for<T>(tile.rows)(args, panel, tile, here);
    if (last) finish(args, tile, here);
  }
}

// One panel's channels for a block of rows. `another`: this thread goes on to the next panel.
template <class T>
void multiply_panel(const ProductArgs& args, float* workspace, int64_t first_row, int64_t column,
                    bool another) {
  const int64_t end = smaller(args.rows, first_row + args.row_block);
  const int64_t tiles = tiles_of(end - first_row), words = step_of(args.depth);
  Tile tile{};
  tile.column = column;
  tile.columns = smaller(kCols, args.width - column);
  for (tile.k = 0; tile.k < args.depth; tile.k += words) {
    tile.depth = smaller(words, args.depth - tile.k);
    tile.first = tile.k == 0;
    const bool last = tile.k + tile.depth == args.depth;
    if (args.packed) {
      const float* panel = args.packed + column * args.depth + tile.k * kCols;
      const int64_t next = last && !another ? 0 : smaller(words, args.depth);
      multiply_step<T>(args, panel, tile, first_row, end, last,
                       prefetch_packed(panel + tile.depth * kCols, next, tiles), workspace);
      continue;
    }
    float* panel = workspace;
    pack_panel(args, column, tile.k, tile.columns, tile.depth, panel);
    multiply_step<T>(args, panel, tile, first_row, end, last,
                     prefetch_next(args, tile, tiles, another), workspace + kDepth * kCols);
  }
}

// Panels [begin, end) of the weights, for `packed` of a later product.
void pack_weight(const ProductArgs& args, float* packed, int64_t begin, int64_t end) {
  for (int64_t column = begin * kCols; column < end * kCols; column += kCols) {
    pack_panel(args, column, 0, smaller(kCols, args.width - column), args.depth,
               packed + column * args.depth);
  }
}

void plan_product(ProductArgs& args, int64_t threads) {
  args.panels = (args.width + kCols - 1) / kCols;
  // Every block of rows packs the weights again, 1 % of the time at 800 rows; and every thread
  // is to have two tasks, so that none waits long for another's last.
  const int64_t by_size = (args.rows + kMaxRowBlock - 1) / kMaxRowBlock;
  const int64_t by_threads = threads < 2 ? 1 : (2 * threads + args.panels - 1) / args.panels;
  const int64_t blocks = by_size > by_threads ? by_size : by_threads;
  const int64_t rows = (args.rows + blocks - 1) / blocks;
  args.row_block = (rows + kRows - 1) / kRows * kRows;
  args.tasks = (args.rows + args.row_block - 1) / args.row_block * args.panels;
}

size_t product_workspace(const ProductArgs& args) {
  const int64_t rows = args.depth <= kDepth ? kRows : args.row_block;
  return static_cast<size_t>(((args.packed ? 0 : kDepth) + rows) * kCols);
}

void product(const ProductArgs& args, float* workspace, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / args.panels * args.row_block, column = task % args.panels * kCols;
    const bool another = task + 1 < args.tasks;  // this thread goes on to it unless that is taken
    if (args.type == Scalar::f32) {
      multiply_panel<float>(args, workspace, row, column, another);
    } else {
      multiply_panel<BF16>(args, workspace, row, column, another);
    }
  }
}

constexpr ProductKernels kernels = {plan_product, product_workspace, product, kCols,
                                    pack_weight};

}  // namespace products
