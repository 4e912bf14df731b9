// Attention on fp32 tensors with both products in bf16, their sums and the softmax in fp32: for
// callers whose inputs are coarser than bf16 already (the blocks in 8-bit integers), where the
// processor multiplies pairs of bf16 at twice the rate. Included by attention.inl.
//
// A word holds two neighbours along the axis that is summed: channels of a query and a key, keys
// of a row of probabilities and of the values.

#if defined(DEIT_BF16_PRODUCTS)

constexpr int64_t kStep = 2 * kWidth;  // elements of a vector of words

// Elsewhere fp32 products serve the same call, more exactly.
DEIT_INLINE bool in_bf16(const AttentionArgs& args) {
  return args.bf16_products && args.type == Scalar::f32 && args.head_dim % kStep == 0 &&
         !args.rope.sin;
}

struct Bf16Workspace {
  int64_t keys_padded;
  float* keys;     // panels of [d / 2, kPanel]
  float* values;   // [keys_padded / 2, d]
  float* queries;  // [query_tile, d / 2], times scale
  float* scores;   // [query_tile, keys_padded]
  float* out;      // [query_tile, d]
  float* end;
};

DEIT_INLINE Bf16Workspace lay_out_bf16(const AttentionArgs& args, float* start) {
  Bf16Workspace w;
  w.keys_padded = round_up(args.tokens, kStep);
  w.keys = start;
  w.values = w.keys + round_up(args.tokens, kPanel) * args.head_dim / 2;
  w.queries = w.values + w.keys_padded / 2 * args.head_dim;
  w.scores = w.queries + args.query_tile * args.head_dim / 2;
  w.out = w.scores + args.query_tile * w.keys_padded;
  w.end = w.out + args.query_tile * args.head_dim;
  return w;
}

size_t bf16_workspace(const AttentionArgs& args) {
  return static_cast<size_t>(lay_out_bf16(args, nullptr).end - static_cast<float*>(nullptr));
}

// The keys transposed: panel p holds [d / 2, kPanel], zeros past key N.
DEIT_INLINE void pack_keys_bf16(const float* keys, int64_t stride, int64_t tokens, int64_t padded,
                                int64_t dim, float* to) {
  for (int64_t first_key = 0; first_key < padded; first_key += kWidth) {
    float* panel = to + first_key / kPanel * kPanel * dim / 2 + first_key % kPanel;
    for (int64_t k = 0; k < dim; k += kStep) {
      Vec block[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        const float* row = keys + (first_key + j) * stride + k;
        block[j] = first_key + j < tokens ? narrowed(load(row), load(row + kWidth))
                                          : broadcast(0.0f);
      }
      transpose(block);
      for (int j = 0; j < kWidth; ++j) store(panel + (k / 2 + j) * kPanel, block[j]);
    }
  }
}

DEIT_INLINE void pack_values_bf16(const float* values, int64_t stride, int64_t tokens,
                                  int64_t padded, int64_t dim, float* to) {
  for (int64_t key = 0; key < padded; key += 2, to += dim) {
    const float* row = values + key * stride;
    for (int64_t k = 0; k < dim; k += kWidth) {
      const Vec low = key < tokens ? load(row + k) : broadcast(0.0f);
      const Vec high = key + 1 < tokens ? load(row + stride + k) : broadcast(0.0f);
      store(to + k, interleaved(low, high));
    }
  }
}

// One tile of queries against the packed keys and values.
DEIT_INLINE void attend_in_bf16(const AttentionArgs& args, const Bf16Workspace& w,
                                const float* queries, int64_t count, const float* key_bias,
                                float* out) {
  const int64_t dim = args.head_dim, depth = dim / 2;
  const Vec scale = broadcast(args.scale);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = queries + i * args.stride_token;
    for (int64_t k = 0; k < dim; k += kStep) {
      store(w.queries + i * depth + k / 2,
            narrowed(load(row + k) * scale, load(row + k + kWidth) * scale));
    }
  }
  for (int64_t key = 0; key < w.keys_padded; key += kPanel) {
    const int64_t left = w.keys_padded - key;
    const int vectors = static_cast<int>((left < kPanel ? left : kPanel) / kWidth);
    product<BF16>(w.queries, depth, w.keys + key * depth, kPanel, count, depth, depth, vectors,
                  w.scores + key, w.keys_padded);
  }
  float inverse[64];
  for (int64_t i = 0; i < count; ++i) {
    inverse[i] = softmax_row<true>(w.scores + i * w.keys_padded, key_bias, args.tokens,
                                   w.keys_padded);
  }
  for (int64_t k = 0; k < dim; k += kPanel) {
    const int64_t left = dim - k;
    const int vectors = static_cast<int>((left < kPanel ? left : kPanel) / kWidth);
    product<BF16>(w.scores, w.keys_padded, w.values + k, dim, count, w.keys_padded / 2, kChain,
                  vectors, w.out + k, dim);
  }
  for (int64_t i = 0; i < count; ++i) {
    write_out(w.out + i * dim, dim, inverse[i], out + i * args.heads * dim);
  }
}

void attention_in_bf16(const AttentionArgs& args, float* workspace, int64_t begin, int64_t end) {
  const Bf16Workspace w = lay_out_bf16(args, workspace);
  const int64_t dim = args.head_dim, channels = args.heads * dim;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head_of_image = task / args.tiles;
    const int64_t b = head_of_image / args.heads, h = head_of_image % args.heads;
    const float* q = static_cast<const float*>(args.qkv) + b * args.stride_batch + h * dim;
    if (packed != head_of_image) {
      pack_keys_bf16(q + channels, args.stride_token, args.tokens, w.keys_padded, dim, w.keys);
      pack_values_bf16(q + 2 * channels, args.stride_token, args.tokens, w.keys_padded, dim,
                       w.values);
      packed = head_of_image;
    }
    const int64_t start = task % args.tiles * args.query_tile;
    const int64_t left = args.tokens - start;
    attend_in_bf16(args, w, q + start * args.stride_token,
                   left < args.query_tile ? left : args.query_tile,
                   args.key_bias ? args.key_bias + b * args.tokens : nullptr,
                   static_cast<float*>(args.out) + (b * args.tokens + start) * channels + h * dim);
  }
}

#else

DEIT_INLINE bool in_bf16(const AttentionArgs&) { return false; }
DEIT_INLINE size_t bf16_workspace(const AttentionArgs&) { return 0; }
DEIT_INLINE void attention_in_bf16(const AttentionArgs&, float*, int64_t, int64_t) {}

#endif
