// softmax(q kT * scale + key_bias) v (arXiv 1706.03762, eq. 1) on the packed projection.
// Included by kernels.cpp.
//
// A task is one tile of queries of one head of one image. The head's keys (transposed, in panels
// the micro-kernel reads with unit stride) and values are packed into fp32 once per range, since
// a range's consecutive tasks share their head: 2 * N * d elements against 2 * N * N * d
// multiply-adds. Scores of the tile stay in cache; the softmax is the plain two-pass one, exact
// for any N. All matrix products go through `product`.

// Terms added up in one chain; longer sums are added chain by chain. Against fp64, in units of
// PyTorch's own error at N = 197, chains of 256 gave 1.1 (norm) and up to 1.55 (maximum), chains
// of 64 give 0.93 and 1.1. Without fused multiply-add they are 16.
constexpr int64_t kChain = kFused ? 64 : 16;
// Below 12 keys BLAS adds a score up in many short chains. There our chains of 64 were off by 1.36
// times PyTorch's error (200 draws of each N, one head); chains of 16 are off by 0.97 times. From
// 12 keys on BLAS has chains of 64 itself, and ours share its rounding errors, which are all there
// is in a nearly one-hot softmax.
constexpr int64_t kFewKeys = 12;
constexpr int64_t kShortChain = 16;

// c = a b for any depth, in chains of at most `chain` words.
template <class W = float>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
             int64_t depth, int64_t chain, int vectors, float* c, int64_t ldc) {
  for (int64_t k = 0; k < depth; k += chain) {
    const int64_t terms = depth - k < chain ? depth - k : chain;
    multiply<W, false, false>(a + k, lda, b + k * ldb, ldb, rows, terms, vectors, k > 0, c, ldc);
  }
}

// Where the pieces of a range's workspace lie.
struct Workspace {
  int64_t keys_padded;  // N up to whole vectors
  int64_t dim_padded;   // d up to whole vectors
  float* keys;          // panels of [d, kPanel]
  float* values;        // [N, dim_padded]
  float* queries;       // [query_tile, d], times scale
  float* scores;        // [query_tile, keys_padded]
  float* out;           // [query_tile, dim_padded]
  float* turned;        // [kWidth, d] of the keys, where there are rotary positions
  float* end;
};

DEIT_INLINE Workspace lay_out(const AttentionArgs& args, float* start) {
  Workspace w;
  w.keys_padded = round_up(args.tokens, kWidth);
  w.dim_padded = round_up(args.head_dim, kWidth);
  w.keys = start;
  w.values = w.keys + round_up(args.tokens, kPanel) * args.head_dim;
  w.queries = w.values + args.tokens * w.dim_padded;
  w.scores = w.queries + round_up(args.query_tile * args.head_dim, 16);
  w.out = w.scores + args.query_tile * w.keys_padded;
  w.turned = w.out + args.query_tile * w.dim_padded;
  w.end = w.turned + (args.rope.sin ? round_up(kWidth * args.head_dim, 16) : 0);
  return w;
}

// rows x d of `from` (row stride `stride`) into fp32, times `factor`, d padded with zeros.
template <class T>
DEIT_INLINE void pack(const T* from, int64_t stride, int64_t rows, int64_t dim, float factor,
                      float* to, int64_t ldt) {
  const Vec f = broadcast(factor);
  for (int64_t i = 0; i < rows; ++i, from += stride, to += ldt) {
    int64_t k = 0;
    for (; k + kWidth <= dim; k += kWidth) store(to + k, load(from + k) * f);
    if (k == dim) continue;
    const int rest = static_cast<int>(dim - k);
    const Vec last = load_first(from + k, rest) * f;
    if (ldt >= k + kWidth) {
      store(to + k, last);
    } else {
      store_first(to + k, last, rest);
    }
  }
}

// The keys transposed: panel p holds [d, kPanel], zeros past key N.
template <class T>
DEIT_INLINE void pack_keys(const T* keys, int64_t stride, int64_t tokens, int64_t dim, float* to) {
  for (int64_t first_key = 0; first_key < tokens; first_key += kWidth) {
    float* panel = to + first_key / kPanel * kPanel * dim + first_key % kPanel;
    for (int64_t k = 0; k < dim; k += kWidth) {
      const int lanes = static_cast<int>(dim - k < kWidth ? dim - k : kWidth);
      Vec block[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        const T* row = keys + (first_key + j) * stride + k;
        block[j] = first_key + j >= tokens ? broadcast(0.0f)
                   : lanes == kWidth       ? load(row)
                                           : load_first(row, lanes);
      }
      transpose(block);
      for (int j = 0; j < lanes; ++j) store(panel + (k + j) * kPanel, block[j]);
    }
  }
}

DEIT_INLINE bool is_power_of_two(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return a > 0.0f && (bits & 0x7fffffu) == 0;
}

// Scores -> exp(scale * score + bias - largest), in place; returns 1 / their sum. A row whose every
// score is -inf becomes zeros, as in PyTorch's scaled_dot_product_attention. `lse`, where it is
// asked for, is log(sum(exp(scores))). kPaired: they become bf16, two a word, in the first half of
// the row; `padded` is then a multiple of two vectors. A power of two scales in the exponent's
// multiply-add, exactly: the largest score's exponent must be 0, whatever its size.
template <bool kPaired = false>
DEIT_INLINE float softmax_row(float* scores, const float* key_bias, int64_t tokens, int64_t padded,
                              float* lse = nullptr, float scale = 1.0f) {
  const float infinity = __builtin_inff();
  if (scale != 1.0f && (key_bias || !is_power_of_two(scale))) {
    for (int64_t j = 0; j < tokens; j += kWidth) {
      store(scores + j, load(scores + j) * broadcast(scale));
    }
    scale = 1.0f;
  }
  for (int64_t j = tokens; j < padded; ++j) scores[j] = -infinity;
  Vec top = broadcast(-infinity);
  int64_t j = 0;
  if (key_bias) {
    for (; j + kWidth <= tokens; j += kWidth) {
      const Vec s = load(scores + j) + load(key_bias + j);
      store(scores + j, s);
      top = max(s, top);
    }
    for (; j < tokens; ++j) scores[j] += key_bias[j];
    j = tokens / kWidth * kWidth;
  }
  for (; j < padded; j += kWidth) top = max(load(scores + j), top);
  const float largest_score = largest(top) * scale;
  if (lse) *lse = largest_score;
  if (largest_score == -infinity) {
    float total = 0.0f;  // -inf unless a score is NaN, which `max` passes over
    for (j = 0; j < tokens; ++j) total += scores[j];
    if (total == total) {
      for (j = 0; j < padded; ++j) scores[j] = 0.0f;
      return 0.0f;
    }
  }
  const Vec factor = broadcast(scale), base = broadcast(-largest_score);
  Vec total = broadcast(0.0f);
  j = 0;
#if defined(DEIT_BF16_PRODUCTS)
  for (; kPaired && j < padded; j += 2 * kWidth) {
    const Vec p = exp_nonpositive(fma(load(scores + j), factor, base));
    const Vec next = exp_nonpositive(fma(load(scores + j + kWidth), factor, base));
    store(scores + j / 2, narrowed(p, next));
    total = total + (p + next);
  }
#endif
  for (; j < padded; j += kWidth) {
    const Vec p = exp_nonpositive(fma(load(scores + j), factor, base));
    store(scores + j, p);
    total = total + p;
  }
  const float all = sum(total);
  if (lse) *lse += __builtin_logf(all);
  return 1.0f / all;
}

template <class T>
DEIT_INLINE void write_out(const float* from, int64_t dim, float factor, T* to) {
  const Vec f = broadcast(factor);
  int64_t k = 0;
  for (; k + kWidth <= dim; k += kWidth) store(to + k, load(from + k) * f);
  if (k < dim) store_first(to + k, load(from + k) * f, static_cast<int>(dim - k));
}

#include "attention_rope.inl"

// The tile of `count` queries from `start` on against the packed keys and values of their head.
template <class T>
void attend(const AttentionArgs& args, const Workspace& w, const T* queries, int64_t head,
            int64_t start, int64_t count, const float* key_bias, T* out, float* lse) {
  const int64_t tokens = args.tokens, dim = args.head_dim;
  pack_turned(queries, args.stride_token, start, count, dim, args.scale, args.rope, head,
              w.queries, dim);
  const int64_t chain = tokens < kFewKeys ? kShortChain : kChain;
  for (int64_t key = 0; key < tokens; key += kPanel) {
    const int64_t left = w.keys_padded - key;
    const int vectors = static_cast<int>((left < kPanel ? left : kPanel) / kWidth);
    product(w.queries, dim, w.keys + key * dim, kPanel, count, dim, chain, vectors,
            w.scores + key, w.keys_padded);
  }
  float inverse[64];
  for (int64_t i = 0; i < count; ++i) {
    inverse[i] = softmax_row(w.scores + i * w.keys_padded, key_bias, tokens, w.keys_padded,
                             lse ? lse + i : nullptr);
  }
  for (int64_t k = 0; k < w.dim_padded; k += kPanel) {
    const int64_t left = w.dim_padded - k;
    const int vectors = static_cast<int>((left < kPanel ? left : kPanel) / kWidth);
    product(w.scores, w.keys_padded, w.values + k, w.dim_padded, count, tokens, kChain, vectors,
            w.out + k, w.dim_padded);
  }
  const int64_t channels = args.heads * dim;
  for (int64_t i = 0; i < count; ++i) {
    write_out(w.out + i * w.dim_padded, dim, inverse[i], out + i * channels);
  }
}

template <class T>
void attention_typed(const AttentionArgs& args, float* workspace, int64_t begin, int64_t end) {
  const Workspace w = lay_out(args, workspace);
  const int64_t channels = args.heads * args.head_dim;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head_of_image = task / args.tiles;
    const int64_t b = head_of_image / args.heads, h = head_of_image % args.heads;
    const T* q = static_cast<const T*>(args.qkv) + b * args.stride_batch + h * args.head_dim;
    if (packed != head_of_image) {
      if (args.rope.sin) {
        pack_turned_keys(q + channels, args.stride_token, args.tokens, args.head_dim, args.rope, h,
                         w.turned, w.keys);
      } else {
        pack_keys(q + channels, args.stride_token, args.tokens, args.head_dim, w.keys);
      }
      pack(q + 2 * channels, args.stride_token, args.tokens, args.head_dim, 1.0f, w.values,
           w.dim_padded);
      packed = head_of_image;
    }
    const int64_t start = task % args.tiles * args.query_tile;
    const int64_t left = args.tokens - start;
    T* out = static_cast<T*>(args.out) + (b * args.tokens + start) * channels + h * args.head_dim;
    attend(args, w, q + start * args.stride_token, h, start,
           left < args.query_tile ? left : args.query_tile,
           args.key_bias ? args.key_bias + b * args.tokens : nullptr, out,
           args.lse ? args.lse + head_of_image * args.tokens + start : nullptr);
  }
}

#include "attention_bf16.inl"

void attention(const AttentionArgs& args, float* workspace, int64_t begin, int64_t end) {
  if (in_bf16(args)) return attention_in_bf16(args, workspace, begin, end);
  switch (args.type) {
    case Scalar::f32: return attention_typed<float>(args, workspace, begin, end);
    case Scalar::f16: return attention_typed<F16>(args, workspace, begin, end);
    case Scalar::bf16: return attention_typed<BF16>(args, workspace, begin, end);
  }
}

// As many queries as keep the tile's scores within 64 KB, whole micro-kernel rows, 6 to 48.
void plan_attention(AttentionArgs& args) {
  int64_t most = 16384 / round_up(args.tokens, kWidth) / kRows * kRows;
  most = most < kRows ? kRows : most > 48 ? 48 : most;
  const int64_t tiles = (args.tokens + most - 1) / most;
  args.query_tile = round_up((args.tokens + tiles - 1) / tiles, kRows);
  args.tiles = (args.tokens + args.query_tile - 1) / args.query_tile;
}

size_t attention_workspace(const AttentionArgs& args) {
  if (in_bf16(args)) return bf16_workspace(args);
  return static_cast<size_t>(lay_out(args, nullptr).end - static_cast<float*>(nullptr));
}
