// The gradient of attention in bf16 with its five products in bf16, their sums and the softmax in
// fp32. Included by attention_bwd.inl, whose names these are.
//
// What is rounded is p and ds. PyTorch rounds these, too, and the sums of dk and dv besides. A word
// holds two neighbours along the axis that is summed, so ds is needed in pairs of keys, for dq, and
// of queries, for dk. Two queries' rows are finished at once: the pairs of queries take the first
// one's place.

#if defined(DEIT_BF16_PRODUCTS)

DEIT_INLINE bool in_bf16(const AttentionGradientArgs& args) {
  return args.type == Scalar::bf16 && args.head_dim % kStep == 0 && !args.rope.sin;
}

struct Bf16GradientWorkspace {
  int64_t keys_padded;
  float *keys_t, *values_t;         // panels [d / 2, kPanel]
  float* keys;                      // pairs [N / 2, d]
  float *dkeys, *dvalues;           // [N, d]
  float *queries, *douts;           // [query_tile, d / 2]
  float *query_pairs, *dout_pairs;  // [query_tile / 2, d]
  float *p, *dp;                    // [query_tile, keys_padded], then pairs of queries in even rows
  float* ds;                        // [query_tile, keys_padded / 2]
  float* dqueries;                  // [query_tile, d]
  float* end;
};

DEIT_INLINE Bf16GradientWorkspace lay_out_bf16(const AttentionGradientArgs& args, float* start) {
  const int64_t dim = args.head_dim, tile = args.query_tile;
  Bf16GradientWorkspace w;
  w.keys_padded = round_up(args.tokens, kStep);
  const auto take = [&start](int64_t floats) {
    float* here = start;
    start += round_up(floats, 16);
    return here;
  };
  w.keys_t = take(round_up(args.tokens, kPanel) * dim / 2);
  w.values_t = take(round_up(args.tokens, kPanel) * dim / 2);
  w.keys = take((args.tokens + 1) / 2 * dim);
  w.dkeys = take(args.tokens * dim);
  w.dvalues = take(args.tokens * dim);
  w.queries = take(tile * dim / 2);
  w.douts = take(tile * dim / 2);
  w.query_pairs = take((tile + 1) / 2 * dim);
  w.dout_pairs = take((tile + 1) / 2 * dim);
  w.p = take((tile + 1) / 2 * 2 * w.keys_padded);
  w.dp = take((tile + 1) / 2 * 2 * w.keys_padded);
  w.ds = take(tile * w.keys_padded / 2);
  w.dqueries = take(tile * dim);
  w.end = start;
  return w;
}

size_t bf16_workspace(const AttentionGradientArgs& args) {
  return static_cast<size_t>(lay_out_bf16(args, nullptr).end - static_cast<float*>(nullptr));
}

// Scores of one query -> p, in place; returns delta. `dp` gets zeros past the last key's vector.
DEIT_INLINE float probabilities(float* scores, float* dp, const float* key_bias, int64_t tokens,
                                int64_t padded, float scale) {
  const Vec inverse = broadcast(softmax_row(scores, key_bias, tokens, padded, nullptr, scale));
  Vec sums[2] = {};
  for (int64_t j = round_up(tokens, kWidth); j < padded; j += kWidth) store(dp + j, sums[0]);
  for (int64_t j = 0; j < padded; j += kWidth) {
    const Vec p = load(scores + j) * inverse;
    store(scores + j, p);
    sums[j / kWidth % 2] = fma(p, load(dp + j), sums[j / kWidth % 2]);
  }
  return sum(sums[0] + sums[1]);
}

// p and dp of two queries, of which the second may be missing -> ds, and both in pairs in the
// first one's places.
DEIT_INLINE void gradient_of_pair(float* p, float* dp, const float (&deltas)[2], bool both,
                                  int64_t padded, float* ds) {
  const Vec delta = broadcast(deltas[0]), next_delta = broadcast(deltas[1]), none = broadcast(0.0f);
  const float *next_p = p + padded, *next_dp = dp + padded;
  for (int64_t j = 0; j < padded; j += kStep) {
    Vec first[2], next[2];
    for (int v = 0; v < 2; ++v) {
      const int64_t k = j + v * kWidth;
      const Vec a = load(p + k), b = both ? load(next_p + k) : none;
      first[v] = a * (load(dp + k) - delta);
      next[v] = both ? b * (load(next_dp + k) - next_delta) : none;
      store(p + k, interleaved(a, b));
      store(dp + k, interleaved(first[v], next[v]));
    }
    store(ds + j / 2, narrowed(first[0], first[1]));
    if (both) store(ds + (padded + j) / 2, narrowed(next[0], next[1]));
  }
}

// One tile of queries: its dq, and its share of dk and dv.
DEIT_INLINE void gradient_of_tile(const AttentionGradientArgs& args,
                                  const Bf16GradientWorkspace& w, const BF16* queries,
                                  const BF16* douts, const float* key_bias, bool add, int64_t count,
                                  BF16* dqueries) {
  const int64_t tokens = args.tokens, dim = args.head_dim, depth = dim / 2;
  const int64_t keys = w.keys_padded, panel = depth * kPanel, pairs = (count + 1) / 2;
  pack_words(queries, args.stride_token, count, dim, w.queries);
  pack_words(douts, args.dout_stride_token, count, dim, w.douts);
  pack_pairs(queries, args.stride_token, count, dim, w.query_pairs);
  pack_pairs(douts, args.dout_stride_token, count, dim, w.dout_pairs);
  multiply_all<false, BF16>(w.queries, depth, w.keys_t, kPanel, panel, count, depth, tokens, false,
                            w.p, keys);
  multiply_all<false, BF16>(w.douts, depth, w.values_t, kPanel, panel, count, depth, tokens, false,
                            w.dp, keys);
  for (int64_t i = 0; i < count; i += 2) {
    float *p = w.p + i * keys, *dp = w.dp + i * keys, deltas[2] = {};
    const bool both = i + 1 < count;
    for (int64_t row = 0; row < 1 + both; ++row) {
      const int64_t at = row * keys;
      deltas[row] = probabilities(p + at, dp + at, key_bias, tokens, keys, args.scale);
    }
    gradient_of_pair(p, dp, deltas, both, keys, w.ds + i * keys / 2);
  }
  multiply_all<false, BF16>(w.ds, keys / 2, w.keys, dim, kPanel, count, (tokens + 1) / 2, dim,
                            false, w.dqueries, dim);
  multiply_all<true, BF16>(w.dp, 2 * keys, w.query_pairs, dim, kPanel, tokens, pairs, dim, add,
                           w.dkeys, dim);
  multiply_all<true, BF16>(w.p, 2 * keys, w.dout_pairs, dim, kPanel, tokens, pairs, dim, add,
                           w.dvalues, dim);
  for (int64_t i = 0; i < count; ++i) {
    write_out(w.dqueries + i * dim, dim, args.scale, dqueries + i * 3 * args.heads * dim);
  }
}

void attention_gradient_in_bf16(const AttentionGradientArgs& args, float* workspace, int64_t begin,
                                int64_t end) {
  const Bf16GradientWorkspace w = lay_out_bf16(args, workspace);
  const int64_t tokens = args.tokens, dim = args.head_dim, channels = args.heads * dim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / args.heads, h = task % args.heads;
    const BF16* q = static_cast<const BF16*>(args.qkv) + b * args.stride_batch + h * dim;
    const BF16* dout = static_cast<const BF16*>(args.dout) + b * args.dout_stride_batch + h * dim;
    BF16* dq = static_cast<BF16*>(args.dqkv) + b * tokens * 3 * channels + h * dim;
    pack_words_across(q + channels, args.stride_token, tokens, dim, w.keys_t);
    pack_words_across(q + 2 * channels, args.stride_token, tokens, dim, w.values_t);
    pack_pairs(q + channels, args.stride_token, tokens, dim, w.keys);
    for (int64_t start = 0; start < tokens; start += args.query_tile) {
      const int64_t left = tokens - start;
      gradient_of_tile(args, w, q + start * args.stride_token,
                       dout + start * args.dout_stride_token,
                       args.key_bias ? args.key_bias + b * tokens : nullptr, start > 0,
                       left < args.query_tile ? left : args.query_tile, dq + start * 3 * channels);
    }
    for (int64_t i = 0; i < tokens; ++i) {
      BF16* row = dq + i * 3 * channels;
      write_out(w.dkeys + i * dim, dim, args.scale, row + channels);
      write_out(w.dvalues + i * dim, dim, 1.0f, row + 2 * channels);
    }
  }
}

#else

DEIT_INLINE bool in_bf16(const AttentionGradientArgs&) { return false; }
DEIT_INLINE size_t bf16_workspace(const AttentionGradientArgs&) { return 0; }
DEIT_INLINE void attention_gradient_in_bf16(const AttentionGradientArgs&, float*, int64_t,
                                            int64_t) {}

#endif
