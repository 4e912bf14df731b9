// Rotary positions (arXiv 2104.09864) of queries and keys as they are packed, and of their
// gradients as they are written. Included by attention.inl.

// -1 in even lanes, 1 in odd ones.
constexpr float kAlternating[16] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};

// to = factor (from * cos + turned(from) * sin), one row of d channels; `turned` takes every pair
// (a, b) to (-b, a). The tables need not have the same number for both channels of a pair.
template <class T>
DEIT_INLINE void turn(const T* from, const float* sin, const float* cos, int64_t dim,
                      bool interleaved, float factor, float* to) {
  const Vec f = broadcast(factor);
  if (interleaved) {
    const Vec signs = load(kAlternating);
    each_vector(dim, [&](int64_t i, int lanes) {
      const Vec x = load_lanes(from + i, lanes), s = load_lanes(sin + i, lanes) * signs;
      store_lanes(to + i, fma(swap_pairs(x), s, x * load_lanes(cos + i, lanes)) * f, lanes);
    });
    return;
  }
  const int64_t half = dim / 2;
  const Vec minus = broadcast(-1.0f);
  each_vector(half, [&](int64_t i, int lanes) {
    const int64_t j = half + i;
    const Vec a = load_lanes(from + i, lanes), b = load_lanes(from + j, lanes);
    const Vec left = load_lanes(sin + i, lanes) * minus, right = load_lanes(sin + j, lanes);
    store_lanes(to + i, fma(b, left, a * load_lanes(cos + i, lanes)) * f, lanes);
    store_lanes(to + j, fma(a, right, b * load_lanes(cos + j, lanes)) * f, lanes);
  });
}

// The gradient of what `turn` read (with factor 1) from that of what it wrote: the transpose.
template <class T>
DEIT_INLINE void turn_back(const float* from, const float* sin, const float* cos, int64_t dim,
                           bool interleaved, T* to) {
  if (interleaved) {
    const Vec minus = load(kAlternating) * broadcast(-1.0f);
    each_vector(dim, [&](int64_t i, int lanes) {
      const Vec x = load_lanes(from + i, lanes);
      const Vec other = swap_pairs(x * load_lanes(sin + i, lanes));
      store_lanes(to + i, fma(other, minus, x * load_lanes(cos + i, lanes)), lanes);
    });
    return;
  }
  const int64_t half = dim / 2;
  const Vec minus = broadcast(-1.0f);
  each_vector(half, [&](int64_t i, int lanes) {
    const int64_t j = half + i;
    const Vec a = load_lanes(from + i, lanes), b = load_lanes(from + j, lanes);
    const Vec left = load_lanes(sin + i, lanes) * minus, right = load_lanes(sin + j, lanes);
    store_lanes(to + i, fma(b, right, a * load_lanes(cos + i, lanes)), lanes);
    store_lanes(to + j, fma(a, left, b * load_lanes(cos + j, lanes)), lanes);
  });
}

// Where a token's row of the tables begins.
DEIT_INLINE int64_t row_of(const Rope& rope, int64_t head, int64_t token) {
  return head * rope.stride_head + (token - rope.prefix) * rope.stride_token;
}

// `pack` of the tokens from `first` on, turned where there are rotary positions.
template <class T>
DEIT_INLINE void pack_turned(const T* from, int64_t stride, int64_t first, int64_t rows,
                             int64_t dim, float factor, const Rope& rope, int64_t head, float* to,
                             int64_t ldt) {
  const int64_t left = rope.prefix - first;
  const int64_t whole = !rope.sin || left > rows ? rows : left > 0 ? left : 0;
  pack(from, stride, whole, dim, factor, to, ldt);
  for (int64_t i = whole; i < rows; ++i) {
    const int64_t at = row_of(rope, head, first + i);
    turn(from + i * stride, rope.sin + at, rope.cos + at, dim, rope.interleaved, factor,
         to + i * ldt);
    for (int64_t k = dim; k < ldt; ++k) to[i * ldt + k] = 0.0f;
  }
}

// `pack_keys`, turned, kWidth keys at a time through `turned`, [kWidth, d].
template <class T>
DEIT_INLINE void pack_turned_keys(const T* keys, int64_t stride, int64_t tokens, int64_t dim,
                                  const Rope& rope, int64_t head, float* turned, float* to) {
  for (int64_t key = 0; key < tokens; key += kWidth) {
    const int64_t count = tokens - key < kWidth ? tokens - key : kWidth;
    pack_turned(keys + key * stride, stride, key, count, dim, 1.0f, rope, head, turned, dim);
    pack_keys(turned, dim, count, dim, to + key / kPanel * kPanel * dim + key % kPanel);
  }
}

// The gradient of one token's query or key, turned back where there are rotary positions.
template <class T>
DEIT_INLINE void write_turned_back(const float* from, int64_t token, int64_t dim, const Rope& rope,
                                   int64_t head, T* to) {
  if (!rope.sin || token < rope.prefix) return write_out(from, dim, 1.0f, to);
  const int64_t at = row_of(rope, head, token);
  turn_back(from, rope.sin + at, rope.cos + at, dim, rope.interleaved, to);
}
