// Attention in one pass over the keys (arXiv 2205.14135), for every GPU of compute capability 8.0 or
// later.
//
// A block has 64 queries of a head, 16 a warp, and goes over its keys in tiles. Keys are brought
// while the tile before is multiplied with its values, and values while the scores are computed:
// one tile of each lies in shared memory, and two barriers a tile say when it may be written again.
// Half precision is multiplied by the matrix units: queries stay in registers, and what a lane has
// of the scores is what it needs of them as a factor. In fp32 a lane does the same by
// multiply-adds, and a score reaches the lanes that need it by a shuffle.
//
// A key_bias of the smallest number is not -inf, and a sample that has no other counts its keys all
// alike. So scores are kept as they are, and only differences are made powers of two.
#include "attention.h"

#include <cmath>

#include "tiles.h"

namespace deit {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kQueries = 16 * kWarps;
// Of a tile: as many as leave a thread the registers for its part of the output.
template <class T, int kDim>
constexpr int kKeys = (sizeof(T) == 2 ? 64 : 32) * 64 / kDim;
template <class T, int kDim>
constexpr int kRowChunks = kDim / kChunk<T>;
template <class T, int kDim>
constexpr int kSharedBytes = (kQueries + 2 * kKeys<T, kDim>) * kDim * static_cast<int>(sizeof(T));

template <class T>
struct Head {
  const T* qkv;
  Values key_bias;
  T* out;
  int64_t stride_batch, stride_token;
  int tokens, heads, head_dim;
  float scale;
  bool aligned, out_aligned;
};

constexpr float kLog2E = 1.4426950408889634f;

// A head's rows from `first` on into shared memory, zeros behind the last and beside the head.
template <class T, int kDim, int kRows>
__device__ __forceinline__ void bring(const Matrix<T>& rows, int first, char* to) {
  constexpr int kChunks = kRowChunks<T, kDim>;
#pragma unroll 1
  for (int at = gpu::thread(); at < kRows * kChunks; at += kThreads) {
    const int row = at / kChunks, chunk = at % kChunks;
    rows.bring(to + place<kChunks>(row, chunk), first + row, chunk * kChunk<T>);
  }
}

// What a lane holds of its warp's 16 queries, g = lane / 4 and g + 8, below each other: sums of the
// exponentials and maxima of the scores, and the output, eight channels a tile, as multiply_add
// has them.
template <class T, int kDim>
struct Softmax {
  static constexpr int kTiles = kKeys<T, kDim> / 8;
  float maximum[2], total[2];
  float out[kDim / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      maximum[below] = -INFINITY;
      total[below] = 0.0f;
    }
#pragma unroll
    for (int tile = 0; tile < kDim / 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[tile][i] = 0.0f;
    }
  }

  // The next keys' scores become exponentials; what was summed before is scaled to their maximum.
  __device__ __forceinline__ void take(float (&scores)[kTiles][4]) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      float largest = maximum[below];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          largest = fmaxf(largest, scores[tile][2 * below + right]);
        }
      }
      largest = fmaxf(largest, gpu::shuffle_xor(largest, 1));
      largest = fmaxf(largest, gpu::shuffle_xor(largest, 2));
      // Where all keys so far have a bias of -inf, their exponentials are 0 and not NaN.
      const float base = largest == -INFINITY ? 0.0f : largest;
      const float factor = gpu::exp2((maximum[below] - base) * kLog2E);
      maximum[below] = largest;
      float sum = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          float& score = scores[tile][2 * below + right];
          score = gpu::exp2((score - base) * kLog2E);
          sum += score;
        }
      }
      total[below] = total[below] * factor + sum;
#pragma unroll
      for (int tile = 0; tile < kDim / 8; ++tile) {
        out[tile][2 * below] *= factor;
        out[tile][2 * below + 1] *= factor;
      }
    }
  }

  // out += the exponentials times the values.
  __device__ __forceinline__ void add(const float (&weights)[kTiles][4], const char* values) {
    constexpr int kChunks = kRowChunks<T, kDim>;
    const int lane = gpu::thread() % kWarp;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int keys = 0; keys < kTiles / 2; ++keys) {  // 16 of them
        const float(&left)[4] = weights[2 * keys];
        const float(&right)[4] = weights[2 * keys + 1];
        const uint32_t a[4] = {gpu::pack<T>(left[0], left[1]), gpu::pack<T>(left[2], left[3]),
                               gpu::pack<T>(right[0], right[1]), gpu::pack<T>(right[2], right[3])};
#pragma unroll
        for (int tile = 0; tile < kDim / 8; tile += 2) {
          uint32_t b[4];
          gpu::load_matrices_transposed(
              b, values + place<kChunks>(16 * keys + lane % 16, tile + lane / 16));
          gpu::multiply_add<T>(out[tile], a, b[0], b[1]);
          gpu::multiply_add<T>(out[tile + 1], a, b[2], b[3]);
        }
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int key = 0; key < 8; ++key) {
          const int owner = lane / 4 * 4 + key / 2;
          const float upper = gpu::shuffle(weights[tile][key % 2], owner);
          const float lower = gpu::shuffle(weights[tile][2 + key % 2], owner);
#pragma unroll
          for (int channels = 0; channels < kDim / 8; ++channels) {
            const int chunk = 2 * channels + lane % 4 / 2;
            const char* const at = values + place<kChunks>(8 * tile + key, chunk) + lane % 2 * 8;
            float v[2];
            load(reinterpret_cast<const float*>(at), v);
#pragma unroll
            for (int right = 0; right < 2; ++right) {
              out[channels][right] = fmaf(upper, v[right], out[channels][right]);
              out[channels][2 + right] = fmaf(lower, v[right], out[channels][2 + right]);
            }
          }
        }
      }
    }
  }
};

// A warp's queries: in registers as factors of the matrix units, in fp32 where they were brought.
template <class T, int kDim>
struct Queries {
  static constexpr int kTiles = kKeys<T, kDim> / 8, kChunks = kRowChunks<T, kDim>;
  uint32_t a[sizeof(T) == 2 ? kDim / 16 : 1][4];
  const char* rows = nullptr;

  __device__ __forceinline__ void read(const char* queries) {
    rows = queries;
    if constexpr (sizeof(T) == 2) {
      const int lane = gpu::thread() % kWarp, row = gpu::thread() / kWarp * 16 + lane % 16;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        gpu::load_matrices(a[k], queries + place<kChunks>(row, 2 * k + lane / 16));
      }
    }
  }

  __device__ __forceinline__ void times(const char* keys, float (&scores)[kTiles][4]) const {
    const int lane = gpu::thread() % kWarp;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][i] = 0.0f;
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          uint32_t b[4];
          gpu::load_matrices(b, keys + place<kChunks>(8 * tile + lane / 16 * 8 + lane % 8,
                                                      2 * k + lane / 8 % 2));
          gpu::multiply_add<T>(scores[tile], a[k], b[0], b[1]);
          gpu::multiply_add<T>(scores[tile + 1], a[k], b[2], b[3]);
        }
      }
    } else {
      const int row = gpu::thread() / kWarp * 16 + lane / 4;
#pragma unroll 1
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        float q[2][4];
        load(reinterpret_cast<const float*>(rows + place<kChunks>(row, chunk)), q[0]);
        load(reinterpret_cast<const float*>(rows + place<kChunks>(row + 8, chunk)), q[1]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int right = 0; right < 2; ++right) {
            float k[4];
            const int key = 8 * tile + 2 * (lane % 4) + right;
            load(reinterpret_cast<const float*>(keys + place<kChunks>(key, chunk)), k);
#pragma unroll
            for (int below = 0; below < 2; ++below) {
              float& score = scores[tile][2 * below + right];
#pragma unroll
              for (int i = 0; i < 4; ++i) score = fmaf(q[below][i], k[i], score);
            }
          }
        }
      }
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && kDim == 64 ? 3 : 2)
    attention_kernel(const __grid_constant__ Head<T> args) {
  constexpr int kTiles = kKeys<T, kDim> / 8;
  char* const queries = gpu::shared_memory();
  char* const keys = queries + kQueries * kDim * sizeof(T);
  char* const values = keys + kKeys<T, kDim> * kDim * sizeof(T);
  const int lane = gpu::thread() % kWarp, warp = gpu::thread() / kWarp;
  const int across = (args.tokens + kQueries - 1) / kQueries;
  const int first = gpu::block() % across * kQueries;
  const int head = gpu::block() / across % args.heads;
  const int64_t sample = gpu::block() / across / args.heads;
  const auto part = [&](int which) {  // q, k or v of this head
    const int64_t channel = (static_cast<int64_t>(which) * args.heads + head) * args.head_dim;
    return Matrix<T>{args.qkv + sample * args.stride_batch + channel, args.stride_token,
                     args.tokens, args.head_dim, args.aligned};
  };
  const Matrix<T> k = part(1), v = part(2);

  bring<T, kDim, kQueries>(part(0), first, queries);
  bring<T, kDim, kKeys<T, kDim>>(k, 0, keys);
  gpu::copies_commit();
  Queries<T, kDim> q;
  Softmax<T, kDim> softmax;
  softmax.clear();
  for (int from = 0; from < args.tokens; from += kKeys<T, kDim>) {
    gpu::copies_wait<0>();
    gpu::block_barrier();  // the keys are there, and the values before them were read
    bring<T, kDim, kKeys<T, kDim>>(v, from, values);
    gpu::copies_commit();
    if (from == 0) q.read(queries);
    float scores[kTiles][4];
    q.times(keys, scores);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        const int key = from + 8 * tile + 2 * (lane % 4) + right;
        float bias = key < args.tokens ? 0.0f : -INFINITY;
        if (args.key_bias.data != nullptr && key < args.tokens) {
          const int64_t at = sample * args.tokens + key;
          bias = args.key_bias.fp32
                     ? static_cast<const float*>(args.key_bias.data)[at]
                     : gpu::widen(static_cast<const T*>(args.key_bias.data)[at]);
        }
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          float& score = scores[tile][2 * below + right];
          score = fmaf(score, args.scale, bias);
        }
      }
    }
    softmax.take(scores);
    gpu::copies_wait<0>();
    gpu::block_barrier();  // the values are there, and the keys were read
    if (from + kKeys<T, kDim> < args.tokens) bring<T, kDim, kKeys<T, kDim>>(k, from + kKeys<T, kDim>, keys);
    gpu::copies_commit();
    softmax.add(scores, values);
  }

#pragma unroll
  for (int below = 0; below < 2; ++below) {
    float total = softmax.total[below];
    total += gpu::shuffle_xor(total, 1);
    total += gpu::shuffle_xor(total, 2);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // no key counts: zeros
    const int row = first + 16 * warp + 8 * below + lane / 4;
#pragma unroll
    for (int tile = 0; tile < kDim / 8; tile += 4) {
      float pairs[4][2], y[8];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        pairs[n][0] = softmax.out[tile + n][2 * below] * inverse;
        pairs[n][1] = softmax.out[tile + n][2 * below + 1] * inverse;
      }
      gather_columns(pairs, y);
      const int channel = 8 * (tile + lane % 4);
      if (row >= args.tokens || channel >= args.head_dim) continue;
      const int64_t at = (sample * args.tokens + row) * args.heads + head;
      store_some(y, args.out_aligned, args.head_dim - channel,
                 args.out + at * args.head_dim + channel);
    }
  }
}

template <class T>
const char* launch(const AttentionArgs& args, void* stream) {
  Head<T> head{static_cast<const T*>(args.qkv),
               args.key_bias,
               static_cast<T*>(args.out),
               args.stride_batch,
               args.stride_token,
               static_cast<int>(args.tokens),
               static_cast<int>(args.heads),
               static_cast<int>(args.head_dim),
               args.scale,
               chunks_fit<T>(args.qkv, args.stride_token, args.head_dim) &&
                   args.stride_batch % kChunk<T> == 0,
               chunks_fit<T>(args.out, 0, args.head_dim)};
  const int64_t blocks = (args.tokens + kQueries - 1) / kQueries * args.heads * args.batch;
  if (args.head_dim <= 64) {
    return gpu::launch(attention_kernel<T, 64>, blocks, kThreads, kSharedBytes<T, 64>, stream, head);
  }
  return gpu::launch(attention_kernel<T, 128>, blocks, kThreads, kSharedBytes<T, 128>, stream,
                     head);
}

}  // namespace

const char* launch_attention(const AttentionArgs& args, Scalar type, void* stream) {
  if (type == Scalar::f16) return launch<f16>(args, stream);
  if (type == Scalar::bf16) return launch<bf16>(args, stream);
  return launch<float>(args, stream);
}

}  // namespace deit
