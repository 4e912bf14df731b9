// A whole pre-norm block of one image after another:
//     s = x + gamma1 * proj(attention(qkv(LN(x))));  out = s + gamma2 * fc2(act(fc1(LN(s)))).
// Included by kernels.cpp.
//
// An image's activations are the thread's own and stay in its second-level cache, or near it: in
// DeiT-Ti 0.6 MB before the projection and 0.5 MB after it. Operators that each visit the whole
// batch write and read them in memory. The hidden layer never has more than the kDepth words that
// make one step of the second product: fc1's panels of a step, then that step of all of fc2's
// panels, whose sums wait in the workspace.
//
// Every element is computed by the operators' own operations in their order, so the bits are
// theirs.

namespace blocks {

constexpr int64_t kStatsColumns = 64;

struct Scratch {
  float* normed;  // [tokens, channels]; after qkv, what attention gives
  float* qkv;     // [tokens, 3 * channels]
  float* rest;    // sums of a panel, a row to normalise, or attention's workspace
  float* hidden;  // [tokens, a step of fc2], where qkv was
  float* sums;    // [fc2's panels, tokens, kCols]
  float* end;
};

DEIT_INLINE int64_t aligned(int64_t floats) { return round_up(floats, 16); }

DEIT_INLINE Scratch lay_out(const BlockArgs& args, float* start) {
  const int64_t tokens = args.attention.tokens, channels = args.norm[0].channels;
  const int64_t padded = products::sums_of_panel(tokens);
  Scratch s;
  s.normed = start;
  s.qkv = s.hidden = s.normed + aligned(tokens * channels);
  s.rest = s.qkv + aligned(tokens * args.qkv.width);
  s.sums = s.hidden + aligned(tokens * products::kDepth);
  const int64_t attention = static_cast<int64_t>(attention_workspace(args.attention));
  const int64_t most = padded > attention ? padded : attention;
  float* first = s.rest + (most > channels ? most : channels);
  float* second = s.sums + products::feed_forward_sums(args.fc2);
  s.end = first > second ? first : second;
  return s;
}

size_t block_workspace(const BlockArgs& args) {
  return static_cast<size_t>(lay_out(args, nullptr).end - static_cast<float*>(nullptr));
}

// The means and the sums of squares about them of a row's groups of 64 columns.
template <class T>
DEIT_INLINE void stats_of_row(const T* row, int64_t channels, float* stats) {
  const int64_t parts = (channels + kStatsColumns - 1) / kStatsColumns;
  for (int64_t part = 0; part < parts; ++part, row += kStatsColumns) {
    const int64_t left = channels - part * kStatsColumns;
    const int64_t columns = left < kStatsColumns ? left : kStatsColumns;
    float wide[kStatsColumns];
    const auto [values, mean] = widen_and_mean(row, columns, wide);
    const Vec center = broadcast(mean);
    Vec square = broadcast(0.0f);
    for (int64_t i = 0; i < columns; i += kWidth) {
      const int lanes = static_cast<int>(columns - i < kWidth ? columns - i : kWidth);
      const Vec deviation = lanes == kWidth
                                ? load(values + i) - center
                                : first(load_first(values + i, lanes) - center, lanes);
      square = fma(deviation, deviation, square);
    }
    stats[part] = mean;
    stats[parts + part] = sum(square);
  }
}

template <class T>
void row_stats_typed(const T* x, int64_t channels, float* stats, int64_t begin, int64_t end) {
  const int64_t parts = (channels + kStatsColumns - 1) / kStatsColumns;
  for (int64_t row = begin; row < end; ++row) {
    stats_of_row(x + row * channels, channels, stats + row * 2 * parts);
  }
}

void row_stats(const void* x, Scalar type, int64_t channels, float* stats, int64_t begin,
               int64_t end) {
  switch (type) {
    case Scalar::f32:
      return row_stats_typed(static_cast<const float*>(x), channels, stats, begin, end);
    case Scalar::f16:
      return row_stats_typed(static_cast<const F16*>(x), channels, stats, begin, end);
    case Scalar::bf16:
      return row_stats_typed(static_cast<const BF16*>(x), channels, stats, begin, end);
  }
}

// Rows of one image, contiguous, as its tensors are.
DEIT_INLINE void normalise_image(LayerNormArgs norm, Scalar type, const void* x, int64_t tokens,
                                 void* out, float* scratch) {
  norm.x_type = norm.residual_type = type;
  norm.x = {x, 1, {tokens}, {norm.channels}};
  norm.out = out;
  layer_norm(norm, scratch, 0, tokens);
}

DEIT_INLINE void project(ProductArgs product, const void* x, const void* residual, void* out,
                         float* workspace) {
  product.x = x;
  product.residual = residual;
  product.out = out;
  products::product(product, workspace, 0, product.tasks);
}

template <class T>
void block_typed(const BlockArgs& args, float* workspace, int64_t begin, int64_t end) {
  const Scratch s = lay_out(args, workspace);
  const int64_t tokens = args.attention.tokens, channels = args.norm[0].channels;
  const Scalar type = args.qkv.type;
  const int64_t parts = (channels + kStatsColumns - 1) / kStatsColumns;
  for (int64_t image = begin; image < end; ++image) {
    const T* x = static_cast<const T*>(args.x) + image * tokens * channels;
    T* out = static_cast<T*>(args.out) + image * tokens * channels;
    normalise_image(args.norm[0], type, x, tokens, s.normed, s.rest);
    project(args.qkv, s.normed, nullptr, s.qkv, s.rest);
    AttentionArgs attends = args.attention;
    attends.qkv = s.qkv;
    attends.out = s.normed;
    if (attends.key_bias) attends.key_bias += image * tokens;
    attention(attends, s.rest, 0, attends.heads * attends.tiles);
    project(args.proj, s.normed, x, out, s.rest);
    normalise_image(args.norm[1], type, out, tokens, s.normed, s.rest);
    ProductArgs first = args.fc1, second = args.fc2;
    first.x = s.normed;
    second.residual = second.out = out;
    products::feed_forward<T>(first, second, s.hidden, s.sums);
    row_stats_typed(out, channels, args.row_stats + image * tokens * 2 * parts, 0, tokens);
  }
}

void block(const BlockArgs& args, float* workspace, int64_t begin, int64_t end) {
  if (args.qkv.type == Scalar::f32) {
    block_typed<float>(args, workspace, begin, end);
  } else {
    block_typed<BF16>(args, workspace, begin, end);
  }
}

constexpr BlockKernels kernels = {block_workspace, block, row_stats};

}  // namespace blocks
