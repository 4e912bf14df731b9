// softmax(q kT * scale) v for few queries (arXiv 1706.03762, eq. 1). Included by kernels.cpp.
//
// A task is one query of one head of one image. It reads the head's keys and values where they lie:
// to pack them, as attention.inl does for a tile of queries, costs as much as several queries.

// sum(a * b), `a` padded with zeros to whole vectors. A lane's chain is d / kWidth long.
template <class T>
DEIT_INLINE float dot(const float* a, const T* b, int64_t dim) {
  Vec total = broadcast(0.0f);
  each_vector(dim, [&](int64_t k, int lanes) {
    total = fma(load(a + k), load_lanes(b + k, lanes), total);
  });
  return sum(total);
}

// The weighted sum of the values' columns from one vector on, in attention's chains.
template <class T>
DEIT_INLINE Vec mixed(const float* p, const T* values, int64_t stride, int64_t tokens, int lanes) {
  Vec all = broadcast(0.0f);
  for (int64_t key = 0; key < tokens; key += kChain) {
    const int64_t end = key + kChain < tokens ? key + kChain : tokens;
    Vec chain = broadcast(0.0f);
    for (int64_t j = key; j < end; ++j) {
      chain = fma(broadcast(p[j]), load_lanes(values + j * stride, lanes), chain);
    }
    all = all + chain;
  }
  return all;
}

template <class T>
void cross_attention_typed(const CrossAttentionArgs& args, float* workspace, int64_t begin,
                           int64_t end) {
  const int64_t dim = args.head_dim, channels = args.heads * dim;
  const int64_t padded = round_up(args.tokens, kWidth);
  float* query = workspace;
  float* scores = workspace + round_up(dim, kWidth);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r = task % args.queries, h = task / args.queries % args.heads;
    const int64_t b = task / args.queries / args.heads;
    const T* q = static_cast<const T*>(args.q) + b * args.q_stride_batch +
                 r * args.q_stride_token + h * dim;
    const T* keys = static_cast<const T*>(args.kv) + b * args.kv_stride_batch + h * dim;
    const Vec scale = broadcast(args.scale);
    each_vector(dim, [&](int64_t k, int lanes) {
      store(query + k, load_lanes(q + k, lanes) * scale);
    });
    for (int64_t j = 0; j < args.tokens; ++j) {
      scores[j] = dot(query, keys + j * args.kv_stride_token, dim);
    }
    const Vec inverse = broadcast(softmax_row(scores, nullptr, args.tokens, padded));
    T* out = static_cast<T*>(args.out) + (b * args.queries + r) * channels + h * dim;
    each_vector(dim, [&](int64_t k, int lanes) {
      const T* values = keys + channels + k;
      const Vec sum = mixed(scores, values, args.kv_stride_token, args.tokens, lanes);
      store_lanes(out + k, sum * inverse, lanes);
    });
  }
}

void cross_attention(const CrossAttentionArgs& args, float* workspace, int64_t begin,
                     int64_t end) {
  switch (args.type) {
    case Scalar::f32: return cross_attention_typed<float>(args, workspace, begin, end);
    case Scalar::f16: return cross_attention_typed<F16>(args, workspace, begin, end);
    case Scalar::bf16: return cross_attention_typed<BF16>(args, workspace, begin, end);
  }
}

size_t cross_attention_workspace(const CrossAttentionArgs& args) {
  return static_cast<size_t>(round_up(args.head_dim, kWidth) + round_up(args.tokens, kWidth));
}

constexpr CrossAttentionKernels cross_attention_kernels = {cross_attention_workspace,
                                                           cross_attention};
