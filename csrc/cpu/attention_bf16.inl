// Attention with both products in bf16, their sums and the softmax in fp32, where the processor
// multiplies pairs of bf16 at twice the rate: of tensors in bf16, and of fp32 ones for callers
// whose inputs are coarser than bf16 already (the blocks in 8-bit integers). Included by
// attention.inl.
//
// A word holds two neighbours along the axis that is summed: channels of a query and a key, keys
// of a row of probabilities and of the values. Scores are scaled, and not queries: tensors in bf16
// are multiplied as they are, and round nothing but the probabilities, as PyTorch's do.

#if defined(DEIT_BF16_PRODUCTS)

constexpr int64_t kStep = 2 * kWidth;  // elements of a vector of words

// Elsewhere fp32 products serve the same call, more exactly.
DEIT_INLINE bool in_bf16(const AttentionArgs& args) {
  const bool wanted = args.type == Scalar::bf16 || (args.bf16_products && args.type == Scalar::f32);
  return wanted && args.head_dim % kStep == 0 && !args.rope.sin;
}

struct Bf16Workspace {
  int64_t keys_padded;
  float* keys;     // panels of [d / 2, kPanel]
  float* values;   // [keys_padded / 2, d]
  float* queries;  // [query_tile, d / 2]
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

// kStep neighbours as words, and the columns of two rows.
DEIT_INLINE Vec words_of(const float* p) { return narrowed(load(p), load(p + kWidth)); }
DEIT_INLINE Vec words_of(const BF16* p) {  // which no word's alignment is promised of
  Vec words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
DEIT_INLINE Vec pairs_of(const float* low, const float* high) {
  return interleaved(load(low), load(high));
}
DEIT_INLINE Vec pairs_of(const BF16* low, const BF16* high) { return load_pairs(low, high); }

// Rows as words, [rows, d / 2].
template <class T>
DEIT_INLINE void pack_words(const T* from, int64_t stride, int64_t rows, int64_t dim, float* to) {
  for (int64_t i = 0; i < rows; ++i, from += stride, to += dim / 2) {
    for (int64_t k = 0; k < dim; k += kStep) store(to + k / 2, words_of(from + k));
  }
}

// Rows transposed: panel p holds [d / 2, kPanel], zeros past the last row in its vector.
template <class T>
DEIT_INLINE void pack_words_across(const T* rows, int64_t stride, int64_t count, int64_t dim,
                                   float* to) {
  for (int64_t first = 0; first < count; first += kWidth) {
    float* panel = to + first / kPanel * kPanel * dim / 2 + first % kPanel;
    for (int64_t k = 0; k < dim; k += kStep) {
      Vec block[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        block[j] = first + j < count ? words_of(rows + (first + j) * stride + k) : broadcast(0.0f);
      }
      transpose(block);
      for (int j = 0; j < kWidth; ++j) store(panel + (k / 2 + j) * kPanel, block[j]);
    }
  }
}

// Pairs of rows, [count / 2, d] words; a last row by itself has zeros beside it.
template <class T>
DEIT_INLINE void pack_pairs(const T* rows, int64_t stride, int64_t count, int64_t dim, float* to) {
  const T zeros[kWidth] = {};
  for (int64_t i = 0; i < count; i += 2, rows += 2 * stride, to += dim) {
    for (int64_t k = 0; k < dim; k += kWidth) {
      store(to + k, pairs_of(rows + k, i + 1 < count ? rows + stride + k : zeros));
    }
  }
}

// One tile of queries against the packed keys and values.
template <class T>
void attend_in_bf16(const AttentionArgs& args, const Bf16Workspace& w, const T* queries,
                    int64_t count, const float* key_bias, T* out, float* lse) {
  const int64_t tokens = args.tokens, dim = args.head_dim, depth = dim / 2;
  pack_words(queries, args.stride_token, count, dim, w.queries);
  for (int64_t key = 0; key < tokens; key += kPanel) {
    product<BF16>(w.queries, depth, w.keys + key * depth, kPanel, count, depth, depth,
                  vectors_of(tokens - key), w.scores + key, w.keys_padded);
  }
  float inverse[64];
  for (int64_t i = 0; i < count; ++i) {
    inverse[i] = softmax_row<true>(w.scores + i * w.keys_padded, key_bias, tokens, w.keys_padded,
                                   lse ? lse + i : nullptr, args.scale);
  }
  for (int64_t k = 0; k < dim; k += kPanel) {
    product<BF16>(w.scores, w.keys_padded, w.values + k, dim, count, (tokens + 1) / 2, kChain,
                  vectors_of(dim - k), w.out + k, dim);
  }
  for (int64_t i = 0; i < count; ++i) {
    write_out(w.out + i * dim, dim, inverse[i], out + i * args.heads * dim);
  }
}

template <class T>
void attention_in_bf16_typed(const AttentionArgs& args, float* workspace, int64_t begin,
                             int64_t end) {
  const Bf16Workspace w = lay_out_bf16(args, workspace);
  const int64_t tokens = args.tokens, dim = args.head_dim, channels = args.heads * dim;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head_of_image = task / args.tiles;
    const int64_t b = head_of_image / args.heads, h = head_of_image % args.heads;
    const T* q = static_cast<const T*>(args.qkv) + b * args.stride_batch + h * dim;
    if (packed != head_of_image) {
      pack_words_across(q + channels, args.stride_token, tokens, dim, w.keys);
      pack_pairs(q + 2 * channels, args.stride_token, tokens, dim, w.values);
      packed = head_of_image;
    }
    const int64_t start = task % args.tiles * args.query_tile;
    const int64_t left = tokens - start;
    attend_in_bf16(args, w, q + start * args.stride_token,
                   left < args.query_tile ? left : args.query_tile,
                   args.key_bias ? args.key_bias + b * tokens : nullptr,
                   static_cast<T*>(args.out) + (b * tokens + start) * channels + h * dim,
                   args.lse ? args.lse + head_of_image * tokens + start : nullptr);
  }
}

void attention_in_bf16(const AttentionArgs& args, float* workspace, int64_t begin, int64_t end) {
  args.type == Scalar::f32 ? attention_in_bf16_typed<float>(args, workspace, begin, end)
                           : attention_in_bf16_typed<BF16>(args, workspace, begin, end);
}

#else

DEIT_INLINE bool in_bf16(const AttentionArgs&) { return false; }
DEIT_INLINE size_t bf16_workspace(const AttentionArgs&) { return 0; }
DEIT_INLINE void attention_in_bf16(const AttentionArgs&, float*, int64_t, int64_t) {}

#endif
