// dweight = gT x and dbias = the sum of g's rows. Included by kernels.cpp.
//
// Both operands have the rows for their depth, so a chunk of kChain rows is packed by copying, with
// nothing to transpose: x goes into panels [kChain, kPanel], g side by side. The block of dweight
// stays in the second-level cache while all rows go by. (Panels [kChain, kRows] of g took a quarter
// of the time: ten times as many stores, most of them across a cache line.)

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

// [rows, columns] of `from` at row stride ldt: rows of a wide matrix lie multiples of KBs apart,
// where a chunk of them would meet in a few sets of L1.
DEIT_INLINE void pack_rows(const float* from, int64_t ldf, int64_t rows, int64_t columns, float* to,
                           int64_t ldt) {
  for (int64_t i = 0; i < rows; ++i, from += ldf, to += ldt) {
    each_vector(columns, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      store_lanes(to + j, load_lanes(from + j, lanes), lanes);
    });
  }
}

// bias += the sum of a chunk's rows, four chains a column, and chunks in fp64.
DEIT_INLINE void add_rows(const float* g, int64_t ldg, int64_t rows, int64_t columns,
                          double* bias) {
  each_vector(columns, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    Vec chains[kChains] = {};
    for (int64_t i = 0; i < rows; ++i) {
      chains[i % kChains] = chains[i % kChains] + load_lanes(g + i * ldg + j, lanes);
    }
    float total[kWidth];
    store(total, joined(chains));
    for (int lane = 0; lane < lanes; ++lane) bias[j + lane] += static_cast<double>(total[lane]);
  });
}

DEIT_INLINE void add_chunk(const GradientBlock& b, int64_t ldg, int64_t rows, bool add) {
  for (int64_t j = 0; j < b.inputs; j += kPanel) {
    multiply<float, true>(b.g, ldg, b.x + j * rows, kPanel, b.outputs, rows,
                          vectors_of(b.inputs - j), add, b.sums + j, b.inputs_padded);
  }
}

void weight_gradient(const WeightGradientArgs& args, float* workspace, int64_t begin,
                     int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const GradientBlock b = block_of(args, task, workspace);
    const bool sums_bias = args.dbias && b.first_input == 0;
    for (int64_t i = 0; i < b.outputs; ++i) b.bias[i] = 0.0;
    for (int64_t row = 0; row < args.rows; row += kChain) {
      const int64_t rows = args.rows - row < kChain ? args.rows - row : kChain;
      const float* g = args.g + row * args.ldg + b.first_output;
      for (int64_t j = 0; j < b.inputs; j += kPanel) {
        pack_columns<kPanel>(args.x + row * args.ldx + b.first_input + j, args.ldx, rows,
                             b.inputs - j, b.x + j * rows);
      }
      pack_rows(g, args.ldg, rows, b.outputs, b.g, args.output_block);
      if (sums_bias) add_rows(b.g, args.output_block, rows, b.outputs, b.bias);
      add_chunk(b, args.output_block, rows, row > 0);
    }
    for (int64_t i = 0; i < b.outputs; ++i) {
      if (sums_bias) args.dbias[b.first_output + i] = static_cast<float>(b.bias[i]);
      if (b.inputs == 0) continue;
      const float* from = b.sums + i * b.inputs_padded;
      float* to = args.dweight + (b.first_output + i) * args.inputs + b.first_input;
      each_vector(b.inputs, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        store_lanes(to + j, load(from + j), lanes);
      });
    }
  }
}

void output_gradient(const OutputGradientArgs& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first_row = chunk * kRowChunk, channels = args.channels;
    const int64_t left = args.rows - first_row;
    float* sums = args.dgamma ? args.dgamma + chunk * 2 * channels : nullptr;
    for (int64_t i = 0; sums && i < 2 * channels; ++i) sums[i] = 0.0f;
    for (int64_t row = first_row; row < first_row + (left < kRowChunk ? left : kRowChunk); ++row) {
      const Vec kept = broadcast(args.keep ? args.keep[row / args.rows_per_sample] : 1.0f);
      const float* dout = args.dout + row * args.ldd;
      const int64_t at = row * channels;
      each_vector(channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        const Vec dy = load_lanes(dout + j, lanes) * kept;
        Vec g = args.gamma ? dy * load_lanes(args.gamma + j, lanes) : dy;
        Vec y = args.affine ? load_lanes(args.affine + at + j, lanes) : dy;
        if (args.activation != Activation::none) {
          const Activated found = activate_with_slope(y, args.activation);
          y = found.value;
          g = g * found.slope;
        }
        if (sums) add_exactly(sums + j, sums + channels + j, dy * y, lanes);
        if (args.g) store_lanes(args.g + at + j, g, lanes);
      });
    }
  }
}

constexpr LinearGradientKernels linear_gradient_kernels = {weight_gradient_workspace,
                                                           weight_gradient, output_gradient};
