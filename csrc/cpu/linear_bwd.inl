// dweight = gT x and dbias = the sum of g's rows. Included by kernels.cpp.
//
// Both operands have the rows for their depth, so a chunk of kChain words (rows, or pairs of rows in
// bf16) is packed by copying, with nothing to transpose: x goes into panels [kChain, kPanel], g side
// by side. The block of dweight stays in the second-level cache while all rows go by. (Panels
// [kChain, kRows] of g took a quarter of the time: ten times as many stores, most of them across a
// cache line.)

struct GradientBlock {
  int64_t first_output, outputs, first_input, inputs;
  int64_t inputs_padded;
  float* sums;  // [output_block, inputs_padded]
  float* x;     // panels of a chunk
  float* g;     // [kChain, output_block], of a chunk
  double* bias;
};

DEIT_INLINE GradientBlock block_of(const WeightGradientArgs& args, int64_t task, float* workspace) {
  const int64_t blocks = (args.inputs + args.input_block - 1) / args.input_block;
  const int64_t across = blocks > 1 ? blocks : 1;
  GradientBlock b;
  b.first_output = task / across * args.output_block;
  b.first_input = task % across * args.input_block;
  const int64_t outputs = args.outputs - b.first_output, inputs = args.inputs - b.first_input;
  b.outputs = outputs < args.output_block ? outputs : args.output_block;
  b.inputs = inputs < args.input_block ? inputs : args.input_block;
  b.inputs_padded = round_up(args.input_block, kPanel);
  b.bias = reinterpret_cast<double*>(workspace);
  b.sums = workspace + round_up(2 * args.output_block, 16);
  b.x = b.sums + args.output_block * b.inputs_padded;
  b.g = b.x + kChain * b.inputs_padded;
  return b;
}

size_t weight_gradient_workspace(const WeightGradientArgs& args) {
  const GradientBlock b = block_of(args, 0, nullptr);
  return static_cast<size_t>(b.g - static_cast<float*>(nullptr) + kChain * args.output_block);
}

// Rows of `from` as words at row stride ldt: rows of a wide matrix lie multiples of KBs apart, where
// a chunk of them would meet in a few sets of L1.
template <class T>
DEIT_INLINE void pack_rows(const T* from, int64_t ldf, int64_t rows, int64_t columns, float* to,
                           int64_t ldt) {
  for (; rows > 0; rows -= kInWord<T>, from += kInWord<T> * ldf, to += ldt) {
    each_vector(columns, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      store_lanes(to + j, load_words(from + j, ldf, rows, lanes), lanes);
    });
  }
}

// A word of ones: times it, a word gives the sum of what it holds.
template <class T>
DEIT_INLINE Vec ones() {
  const uint32_t bits = sizeof(T) == sizeof(float) ? 0x3f800000u : 0x3f803f80u;
  float one;
  std::memcpy(&one, &bits, sizeof one);
  return broadcast(one);
}

// bias += the sum of a chunk's rows, four chains a column, and chunks in fp64.
template <class T>
DEIT_INLINE void add_rows(const float* g, int64_t ldg, int64_t words, int64_t columns,
                          double* bias) {
  const Vec one = ones<T>();
  each_vector(columns, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    Vec chains[kChains] = {};
    for (int64_t i = 0; i < words; ++i) {
      Vec& chain = chains[i % kChains];
      chain = multiply_word<T>(load_lanes(g + i * ldg + j, lanes), one, chain);
    }
    float total[kWidth];
    store(total, joined(chains));
    for (int lane = 0; lane < lanes; ++lane) bias[j + lane] += static_cast<double>(total[lane]);
  });
}

template <class T>
DEIT_INLINE void add_chunk(const GradientBlock& b, int64_t ldg, int64_t words, bool add) {
  for (int64_t j = 0; j < b.inputs; j += kPanel) {
    multiply<T, true>(b.g, ldg, b.x + j * words, kPanel, b.outputs, words,
                      vectors_of(b.inputs - j), add, b.sums + j, b.inputs_padded);
  }
}

template <class T>
DEIT_INLINE void write_gradients(const WeightGradientArgs& args, const GradientBlock& b,
                                 bool sums_bias) {
  for (int64_t i = 0; i < b.outputs; ++i) {
    if (sums_bias) {
      const Vec total = broadcast(static_cast<float>(b.bias[i]));
      store_first(static_cast<T*>(args.dbias) + b.first_output + i, total, 1);
    }
    if (b.inputs == 0) continue;
    const float* from = b.sums + i * b.inputs_padded;
    T* to = static_cast<T*>(args.dweight) + (b.first_output + i) * args.inputs + b.first_input;
    each_vector(b.inputs, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      store_lanes(to + j, load(from + j), lanes);
    });
  }
}

// Where rows [row, row + rows) of a sample begin, patches in its image.
DEIT_INLINE void find_patches(const Images& in, int64_t sample, int64_t row, int64_t rows,
                              int64_t* starts) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t down = (row + i) / in.across, right = (row + i) % in.across;
    starts[i] = sample * in.strides[0] + down * in.height * in.strides[2] +
                right * in.width * in.strides[3];
  }
}

// How far from its patch's start an input lies.
DEIT_INLINE int64_t within_patch(const Images& in, int64_t input) {
  const int64_t x = input % in.width, line = input / in.width;
  return line / in.height * in.strides[1] + line % in.height * in.strides[2] + x * in.strides[3];
}

// `pack_columns` of patches that begin at `starts`: their inputs from `input` on. Whole vectors of
// a line are read where they lie, as in patches of 16; elsewhere inputs are read one by one.
template <class T>
DEIT_INLINE void pack_patches(const Images& in, const int64_t* starts, int64_t rows, int64_t input,
                              int64_t columns, float* to) {
  const T* data = static_cast<const T*>(in.data);
  const int64_t count = columns < kPanel ? columns : kPanel;
  for (int64_t j = 0; j < kPanel; j += kWidth) {
    const int64_t left = count - j, first = input + j;
    const int lanes = static_cast<int>(left < 0 ? 0 : left < kWidth ? left : kWidth);
    const bool together =
        lanes == kWidth && in.strides[3] == 1 && first % in.width + kWidth <= in.width;
    int64_t offsets[kWidth] = {};
    for (int lane = 0; lane < lanes; ++lane) offsets[lane] = within_patch(in, first + lane);
    for (int64_t i = 0; i < rows; i += kInWord<T>) {
      const T* row = data + starts[i];
      float* word = to + i / kInWord<T> * kPanel + j;
      if (together) {
        const int64_t next = i + 1 < rows ? starts[i + 1] - starts[i] : 0;
        store(word, load_words(row + offsets[0], next, rows - i, kWidth));
        continue;
      }
      T found[kInWord<T>][kWidth] = {};
      for (int64_t k = 0; k < kInWord<T> && i + k < rows; ++k) {
        for (int lane = 0; lane < lanes; ++lane) {
          found[k][lane] = data[starts[i + k] + offsets[lane]];
        }
      }
      store(word, load_words(found[0], kWidth, kInWord<T>, kWidth));
    }
  }
}

template <class T>
void weight_gradient_typed(const WeightGradientArgs& args, float* workspace, int64_t begin,
                           int64_t end) {
  constexpr int64_t kChunk = kChain * kInWord<T>;  // rows
  int64_t starts[kChunk];
  for (int64_t task = begin; task < end; ++task) {
    const GradientBlock b = block_of(args, task, workspace);
    const bool sums_bias = args.dbias && b.first_input == 0;
    for (int64_t i = 0; i < b.outputs; ++i) b.bias[i] = 0.0;
    for (int64_t at = 0; at < args.samples * args.rows;) {
      const int64_t sample = at / args.rows, row = at % args.rows, left = args.rows - row;
      const int64_t rows = left < kChunk ? left : kChunk;
      const int64_t words = (rows + kInWord<T> - 1) / kInWord<T>;
      if (args.images) find_patches(*args.images, sample, row, rows, starts);
      for (int64_t j = 0; j < b.inputs; j += kPanel) {
        float* panel = b.x + j * words;
        if (args.images) {
          pack_patches<T>(*args.images, starts, rows, b.first_input + j, b.inputs - j, panel);
        } else {
          const T* x = static_cast<const T*>(args.x) + row * args.ldx + b.first_input + j;
          pack_columns<kPanel>(x, args.ldx, rows, b.inputs - j, panel);
        }
      }
      const T* g = static_cast<const T*>(args.g) + sample * args.sample_ldg + row * args.ldg;
      pack_rows(g + b.first_output, args.ldg, rows, b.outputs, b.g, args.output_block);
      if (sums_bias) add_rows<T>(b.g, args.output_block, words, b.outputs, b.bias);
      add_chunk<T>(b, args.output_block, words, at > 0);
      at += rows;
    }
    write_gradients<T>(args, b, sums_bias);
  }
}

void weight_gradient(const WeightGradientArgs& args, float* workspace, int64_t begin,
                     int64_t end) {
  args.type == Scalar::f32 ? weight_gradient_typed<float>(args, workspace, begin, end)
                           : weight_gradient_typed<BF16>(args, workspace, begin, end);
}

template <class T, class Dout>
void output_gradient_typed(const OutputGradientArgs& args, int64_t begin, int64_t end) {
  const T* affine = static_cast<const T*>(args.affine);
  T* out = static_cast<T*>(args.g);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first_row = chunk * kRowChunk, channels = args.channels;
    const int64_t left = args.rows - first_row;
    float* sums = args.dgamma ? args.dgamma + chunk * 2 * channels : nullptr;
    for (int64_t i = 0; sums && i < 2 * channels; ++i) sums[i] = 0.0f;
    for (int64_t row = first_row; row < first_row + (left < kRowChunk ? left : kRowChunk); ++row) {
      const Vec kept = broadcast(args.keep ? args.keep[row / args.rows_per_sample] : 1.0f);
      const Dout* dout = static_cast<const Dout*>(args.dout) + row * args.ldd;
      const int64_t at = row * channels;
      each_vector(channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        const Vec dy = load_lanes(dout + j, lanes) * kept;
        Vec g = args.gamma ? dy * load_lanes(args.gamma + j, lanes) : dy;
        Vec y = affine ? load_lanes(affine + at + j, lanes) : dy;
        if (args.activation != Activation::none) {
          const Activated found = activate_with_slope(y, args.activation);
          y = found.value;
          g = g * found.slope;
        }
        if (sums) add_exactly(sums + j, sums + channels + j, dy * y, lanes);
        if (out) store_lanes(out + at + j, g, lanes);
      });
    }
  }
}

void output_gradient(const OutputGradientArgs& args, int64_t begin, int64_t end) {
  if (args.type == Scalar::f32) return output_gradient_typed<float, float>(args, begin, end);
  args.dout_type == Scalar::f32 ? output_gradient_typed<BF16, float>(args, begin, end)
                                : output_gradient_typed<BF16, BF16>(args, begin, end);
}

constexpr LinearGradientKernels linear_gradient_kernels = {weight_gradient_workspace,
                                                           weight_gradient, output_gradient};
