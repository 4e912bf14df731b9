// Tiles of matrices: where they lie in shared memory, how they are brought there, and how a warp's
// sums become rows again.
#pragma once

#include "device.h"

namespace deit {

// Where chunk `chunk` of 16 bytes of row `row` begins in a tile whose rows have kChunks chunks. The
// eight rows that a matrix of `load_matrices` has lie in banks of their own.
template <int kChunks>
__device__ __forceinline__ int place(int row, int chunk) {
  static_assert(kChunks % 4 == 0);
  const int turned = kChunks == 4 ? chunk ^ (row / 2 % 4) : chunk ^ (row % 8);
  return (row * kChunks + turned) * 16;
}

// How many numbers of T a chunk has.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// A matrix [rows, columns] in memory, `stride` numbers from row to row.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  int rows, columns;
  bool aligned;  // every chunk begins at a multiple of 16 bytes, and the last one is whole

  // Chunk of row `row` that begins at `column` into shared memory, zeros where the matrix ends.
  // Aligned ones are copied asynchronously, others are written at once.
  __device__ __forceinline__ void bring(char* to, int row, int column) const {
    const bool inside = row < rows && column < columns;
    const T* from = inside ? data + row * stride + column : data;
    if (aligned) {
      gpu::copy_async(to, from, inside ? 16 : 0);
      return;
    }
    Pack<T, kChunk<T>> pack;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      pack.lanes[i] = inside && column + i < columns ? from[i] : gpu::narrow<T>(0.0f);
    }
    *reinterpret_cast<Pack<T, kChunk<T>>*>(to) = pack;
  }
};

// Whether chunks of every row begin at multiples of 16 bytes and are whole.
template <class T>
inline bool chunks_fit(const void* data, int64_t stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kChunk<T> == 0 &&
         columns % kChunk<T> == 0;
}

// `count` numbers (more than kCount count as kCount), the others zero; by 16 bytes where `whole`.
template <class T, int kCount>
__device__ __forceinline__ void load_some(const T* from, bool whole, int count,
                                          float (&to)[kCount]) {
  if (whole && count >= kCount) {
#pragma unroll
    for (int at = 0; at < kCount; at += kChunk<T>) {
      float part[kChunk<T>];
      load(from + at, part);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) to[at + i] = part[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = i < count ? gpu::widen(from[i]) : 0.0f;
}

template <class T, int kCount>
__device__ __forceinline__ void store_some(const float (&from)[kCount], bool whole, int count,
                                           T* to) {
  if (whole && count >= kCount) {
#pragma unroll
    for (int at = 0; at < kCount; at += kChunk<T>) {
      float part[kChunk<T>];
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) part[i] = from[at + i];
      store(part, to + at);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) to[i] = gpu::narrow<T>(from[i]);
  }
}

// Four tiles of 8 columns of a row lie in four lanes as `multiply_add` leaves them: lane t has of
// each its columns 2 t and 2 t + 1. Afterwards lane t has all eight columns of tile t.
__device__ __forceinline__ void gather_columns(const float (&pairs)[4][2], float (&columns)[8]) {
  const int lane = gpu::thread() % 4;
  const bool high = lane & 2, odd = lane & 1;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    float half[2][2];  // of the lane with this second bit, tiles of the lane's own second bit
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float kept = high ? pairs[2 + tile][side] : pairs[tile][side];
      const float got =
          gpu::shuffle_xor(high ? pairs[tile][side] : pairs[2 + tile][side], 2);
      half[0][tile] = high ? got : kept;
      half[1][tile] = high ? kept : got;
    }
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const float kept = odd ? half[upper][1] : half[upper][0];
      const float got = gpu::shuffle_xor(odd ? half[upper][0] : half[upper][1], 1);
      columns[4 * upper + side] = odd ? got : kept;
      columns[4 * upper + 2 + side] = odd ? kept : got;
    }
  }
}

}  // namespace deit
