// dweight = gT x and dbias = the sum of g's rows. Included by kernels.cpp.
//
// Both operands have the rows for their depth, so a chunk of kChain rows is packed by copying, with
// nothing to transpose: x into panels [kChain, kPanel], g into panels [kChain, kRows]. The block
// of dweight stays in the second-level cache while all rows go by.

struct GradientBlock {
  int64_t first_output, outputs, first_input, inputs;
  int64_t inputs_padded;
  float* sums;  // [output_block, inputs_padded]
  float* x;     // panels of a chunk
  float* g;     // panels of a chunk, a vector's slack at their end
  double* bias;
};

DEIT_INLINE GradientBlock block_of(const WeightGradientArgs& args, int64_t task, float* workspace) {
  const int64_t across = (args.inputs + args.input_block - 1) / args.input_block;
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
  const int64_t g_floats = kChain * round_up(args.output_block, kRows) + kWidth;
  return static_cast<size_t>(b.g - static_cast<float*>(nullptr) + g_floats);
}

// [rows, columns] into panels [rows, kRows], a vector at a time: what a vector writes past its row
// of a panel is written over by the next row. The last panel is copied by the element, so that
// nothing past the matrix is read.
DEIT_INLINE void pack_narrow(const float* from, int64_t ldf, int64_t rows, int64_t columns,
                             float* to) {
  static_assert(kWidth >= 4, "a vector covers most of a panel's row");
  for (int64_t column = 0; column < columns; column += kRows, to += rows * kRows) {
    const float* row = from + column;
    if (kWidth >= kRows && column + kWidth <= columns) {
      for (int64_t i = 0; i < rows; ++i) store(to + i * kRows, load(row + i * ldf));
      continue;
    }
    const int64_t count = columns - column < kRows ? columns - column : kRows;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < kRows; ++j) to[i * kRows + j] = j < count ? row[i * ldf + j] : 0.0f;
    }
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

DEIT_INLINE void add_chunk(const GradientBlock& b, int64_t rows, bool add) {
  for (int64_t j = 0; j < b.inputs; j += kPanel) {
    const int vectors = vectors_of(b.inputs - j);
    for (int64_t i = 0; i < b.outputs; i += kRows) {
      const int64_t count = b.outputs - i < kRows ? b.outputs - i : kRows;
      multiply<true>(b.g + i * rows, kRows, b.x + j * rows, kPanel, count, rows, vectors, add,
                     b.sums + i * b.inputs_padded + j, b.inputs_padded);
    }
  }
}

void weight_gradient(const WeightGradientArgs& args, float* workspace, int64_t begin,
                     int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const GradientBlock b = block_of(args, task, workspace);
    const bool sums_bias = b.first_input == 0;
    for (int64_t i = 0; i < b.outputs; ++i) b.bias[i] = 0.0;
    for (int64_t row = 0; row < args.rows; row += kChain) {
      const int64_t rows = args.rows - row < kChain ? args.rows - row : kChain;
      const float* g = args.g + row * args.ldg + b.first_output;
      for (int64_t j = 0; j < b.inputs; j += kPanel) {
        pack_panel(args.x + row * args.ldx + b.first_input + j, args.ldx, rows, b.inputs - j,
                   b.x + j * rows);
      }
      pack_narrow(g, args.ldg, rows, b.outputs, b.g);
      if (sums_bias) add_rows(g, args.ldg, rows, b.outputs, b.bias);
      add_chunk(b, rows, row > 0);
    }
    for (int64_t i = 0; i < b.outputs; ++i) {
      const float* from = b.sums + i * b.inputs_padded;
      float* to = args.dweight + (b.first_output + i) * args.inputs + b.first_input;
      each_vector(b.inputs, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        store_lanes(to + j, load(from + j), lanes);
      });
      if (sums_bias) args.dbias[b.first_output + i] = static_cast<float>(b.bias[i]);
    }
  }
}
