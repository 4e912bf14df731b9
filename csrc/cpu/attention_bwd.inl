// The gradient of attention on the packed projection. Included by kernels.cpp.
//
//     p = softmax(q kT scale + key_bias)      dp = dout vT      delta = rowsum(p dp)
//     ds = p (dp - delta)      dq = scale ds k      dk = scale dsT q      dv = pT dout
//
// A task is one head of one image: its keys and values are packed once, and its dk and dv are
// summed in cache over tiles of queries, in order. Probabilities are computed again tile by tile,
// with the forward's own softmax rather than from lse: at scores of 100, lse rounded to fp32 would
// put 4e-6 on every p, and one more pass over a row in L1 is 1 part in 50 of a tile's work.
// delta is summed from p and dp, which are fp32, rather than from out, which may be half precision.
// With rotary positions q and k are turned as they are packed, and dq and dk turned back.

struct GradientWorkspace {
  int64_t keys_padded, dim_padded;
  float *keys_t, *values_t;  // panels [d, kPanel]
  float* keys;               // [N, dim_padded], times scale
  float *dkeys, *dvalues;    // [N, dim_padded]
  float *queries, *douts;    // [query_tile, dim_padded]; queries times scale
  float *p, *ds;             // [query_tile, keys_padded]
  float* dqueries;           // [query_tile, dim_padded]
  float* end;
};

DEIT_INLINE GradientWorkspace lay_out(const AttentionGradientArgs& args, float* start) {
  GradientWorkspace w;
  w.keys_padded = round_up(args.tokens, kWidth);
  w.dim_padded = round_up(args.head_dim, kWidth);
  const int64_t panels = round_up(round_up(args.tokens, kPanel) * args.head_dim, 16);
  const int64_t all = round_up(args.tokens * w.dim_padded, 16);
  const int64_t tile = round_up(args.query_tile * w.dim_padded, 16);
  const int64_t scores = round_up(args.query_tile * w.keys_padded, 16);
  const auto take = [&start](int64_t floats) {
    float* here = start;
    start += floats;
    return here;
  };
  w.keys_t = take(panels);
  w.values_t = take(panels);
  w.keys = take(all);
  w.dkeys = take(all);
  w.dvalues = take(all);
  w.queries = take(tile);
  w.douts = take(tile);
  w.p = take(scores);
  w.ds = take(scores);
  w.dqueries = take(tile);
  w.end = start;
  return w;
}

// c = (or +=) a b for any width, b in panels of [depth, kPanel], or row-major at panel_step kPanel.
// `depth` counts words.
template <bool kOuter, class W = float>
DEIT_INLINE void multiply_all(const float* a, int64_t lda, const float* b, int64_t ldb,
                              int64_t panel_step, int64_t rows, int64_t depth, int64_t width,
                              bool add, float* c, int64_t ldc) {
  for (int64_t column = 0; column < width; column += kPanel) {
    const float* panel = b + column / kPanel * panel_step;
    for (int64_t k = 0; k < depth; k += kChain) {
      const int64_t chain = depth - k < kChain ? depth - k : kChain;
      multiply<W, kOuter>(a + k * (kOuter ? lda : 1), lda, panel + k * ldb, ldb, rows, chain,
                          vectors_of(width - column), add || k > 0, c + column, ldc);
    }
  }
}

// Scores and dp of one query -> p and ds, in place.
DEIT_INLINE void gradient_of_row(float* scores, float* dp, const float* key_bias, int64_t tokens,
                                 int64_t padded) {
  const Vec inverse = broadcast(softmax_row(scores, key_bias, tokens, padded));
  Vec sums[2] = {};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const Vec p = load(scores + j) * inverse;
    store(scores + j, p);
    sums[j / kWidth % 2] = fma(p, load(dp + j), sums[j / kWidth % 2]);
  }
  const Vec delta = broadcast(sum(sums[0] + sums[1]));
  for (int64_t j = 0; j < padded; j += kWidth) {
    store(dp + j, load(scores + j) * (load(dp + j) - delta));
  }
}

// One tile of queries: its dq, and its share of dk and dv.
template <class T>
void gradient_of_tile(const AttentionGradientArgs& args, const GradientWorkspace& w,
                      const T* queries, const T* douts, const float* key_bias, int64_t head,
                      int64_t start, int64_t count, T* dqueries) {
  const bool first_tile = start == 0;
  const int64_t tokens = args.tokens, dim = args.head_dim;
  const int64_t keys = w.keys_padded, width = w.dim_padded, panel = dim * kPanel;
  pack_turned(queries, args.stride_token, start, count, dim, args.scale, args.rope, head, w.queries,
              width);
  pack(douts, args.dout_stride_token, count, dim, 1.0f, w.douts, width);
  multiply_all<false>(w.queries, width, w.keys_t, kPanel, panel, count, dim, keys, false, w.p,
                      keys);
  multiply_all<false>(w.douts, width, w.values_t, kPanel, panel, count, dim, keys, false, w.ds,
                      keys);
  for (int64_t i = 0; i < count; ++i) {
    gradient_of_row(w.p + i * keys, w.ds + i * keys, key_bias, tokens, keys);
  }
  multiply_all<false>(w.ds, keys, w.keys, width, kPanel, count, tokens, width, false, w.dqueries,
                      width);
  multiply_all<true>(w.ds, keys, w.queries, width, kPanel, tokens, count, width, !first_tile,
                     w.dkeys, width);
  multiply_all<true>(w.p, keys, w.douts, width, kPanel, tokens, count, width, !first_tile,
                     w.dvalues, width);
  for (int64_t i = 0; i < count; ++i) {
    write_turned_back(w.dqueries + i * width, start + i, dim, args.rope, head,
                      dqueries + i * 3 * args.heads * dim);
  }
}

template <class T>
void attention_gradient_typed(const AttentionGradientArgs& args, float* workspace, int64_t begin,
                              int64_t end) {
  const GradientWorkspace w = lay_out(args, workspace);
  const int64_t tokens = args.tokens, dim = args.head_dim, channels = args.heads * dim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / args.heads, h = task % args.heads;
    const T* q = static_cast<const T*>(args.qkv) + b * args.stride_batch + h * dim;
    const T* dout = static_cast<const T*>(args.dout) + b * args.dout_stride_batch + h * dim;
    T* dq = static_cast<T*>(args.dqkv) + b * tokens * 3 * channels + h * dim;
    const T *k = q + channels, *v = k + channels;
    pack_keys(v, args.stride_token, tokens, dim, w.values_t);
    if (args.rope.sin) {  // through dk's place, which nothing has used yet
      pack_turned(k, args.stride_token, 0, tokens, dim, 1.0f, args.rope, h, w.dkeys, w.dim_padded);
      pack_keys(w.dkeys, w.dim_padded, tokens, dim, w.keys_t);
      pack(w.dkeys, w.dim_padded, tokens, dim, args.scale, w.keys, w.dim_padded);
    } else {
      pack_keys(k, args.stride_token, tokens, dim, w.keys_t);
      pack(k, args.stride_token, tokens, dim, args.scale, w.keys, w.dim_padded);
    }
    for (int64_t start = 0; start < tokens; start += args.query_tile) {
      const int64_t left = tokens - start;
      gradient_of_tile(args, w, q + start * args.stride_token,
                       dout + start * args.dout_stride_token,
                       args.key_bias ? args.key_bias + b * tokens : nullptr, h, start,
                       left < args.query_tile ? left : args.query_tile,
                       dq + start * 3 * channels);
    }
    for (int64_t i = 0; i < tokens; ++i) {
      T* row = dq + i * 3 * channels;
      write_turned_back(w.dkeys + i * w.dim_padded, i, dim, args.rope, h, row + channels);
      write_out(w.dvalues + i * w.dim_padded, dim, 1.0f, row + 2 * channels);
    }
  }
}

#include "attention_bwd_bf16.inl"

void attention_gradient(const AttentionGradientArgs& args, float* workspace, int64_t begin,
                        int64_t end) {
  if (in_bf16(args)) return attention_gradient_in_bf16(args, workspace, begin, end);
  switch (args.type) {
    case Scalar::f32: return attention_gradient_typed<float>(args, workspace, begin, end);
    case Scalar::f16: return attention_gradient_typed<F16>(args, workspace, begin, end);
    case Scalar::bf16: return attention_gradient_typed<BF16>(args, workspace, begin, end);
  }
}

// As many queries as keep p and ds within 160 KB, whole micro-kernel rows, 6 to 96.
void plan_attention_gradient(AttentionGradientArgs& args) {
  int64_t most = 20480 / round_up(args.tokens, kWidth) / kRows * kRows;
  most = most < kRows ? kRows : most > 96 ? 96 : most;
  const int64_t tiles = (args.tokens + most - 1) / most;
  args.query_tile = round_up((args.tokens + tiles - 1) / tiles, kRows);
}

size_t attention_gradient_workspace(const AttentionGradientArgs& args) {
  if (in_bf16(args)) return bf16_workspace(args);
  return static_cast<size_t>(lay_out(args, nullptr).end - static_cast<float*>(nullptr));
}

constexpr AttentionKernels attention_kernels = {
    plan_attention,          attention_workspace,          attention,
    plan_attention_gradient, attention_gradient_workspace, attention_gradient,
};
