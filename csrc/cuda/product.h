// Products x @ weight.T with an epilogue, for every GPU of compute capability 8.0 or later: the
// kernel that linear.cu and patch_embed.cu are made of.
//
// A block makes a tile of the output. It brings tiles of x and weight three steps of the sum ahead
// by asynchronous copies, 64 bytes of each row a step, into a ring of four slots. Half precision is
// multiplied by the matrix units; fp32 by multiply-adds, whose sums lie in the threads as those of
// the matrix units do. So both have one epilogue, and it writes 16 bytes a thread.
//
// The kernel's one hazard is a slot that is written while it is read. A step begins with a barrier
// behind which its own slot is full, and the slot of the step before is read by nobody.
#pragma once

#include "activations.h"
#include "epilogue.h"
#include "tiles.h"

namespace deit {

constexpr int kStepBytes = 64, kStepChunks = kStepBytes / 16;
constexpr int kSlots = 4;

// out = residual + keep * gamma * act(product + bias), of the residual's type where there is one.
// Row m is written to row m, and the residual's row m is added. With `period` > 0 rows are patches
// of images, behind `before` other rows of each image: patch p of image i is written to row
// i * (before + period) + before + p, and row before + p of the residual is added.
struct Epilogue {
  const void* bias;      // [width] in the product's type
  Values gamma;          // [width]
  Values keep;           // [rows / rows_per_sample]
  Values residual;       // [rows, width], residual_stride numbers from row to row
  void* out;             // [rows, width], contiguous
  int64_t residual_stride, rows_per_sample;
  int period, before;
  Activation activation;
  bool aligned;          // eight columns from a multiple of 8 on are whole chunks of 16 bytes
};

// Warps below and beside one another, each of kHigh * 16 rows and 32 columns of the output.
template <int kDown, int kAcross, int kHigh>
struct Tile {
  static constexpr int down = kDown, across = kAcross, high = kHigh;
  static constexpr int rows = kDown * kHigh * 16, width = kAcross * 32;
  static constexpr int threads = kDown * kAcross * kWarp;
  static constexpr int slot = (rows + width) * kStepBytes;
  static constexpr int shared = kSlots * slot;
};

template <class T, int kHigh>
struct Sums {
  float of[kHigh][4][4];  // [16 rows][8 columns][as multiply_add has them]

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kHigh; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) of[m][n][i] = 0.0f;
      }
    }
  }

  // Adds a step's products of the warp's rows of x from `row` on and of weight from `column` on.
  __device__ __forceinline__ void add(const char* x, int row, const char* weight, int column) {
    const int lane = gpu::thread() % kWarp;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[kHigh][4], b[2][4];
#pragma unroll
        for (int m = 0; m < kHigh; ++m) {
          gpu::load_matrices(
              a[m], x + place<kStepChunks>(row + 16 * m + lane % 16, 2 * half + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          gpu::load_matrices(
              b[n], weight + place<kStepChunks>(column + 16 * n + lane / 16 * 8 + lane % 8,
                                                2 * half + lane / 8 % 2));
        }
#pragma unroll
        for (int m = 0; m < kHigh; ++m) {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            gpu::multiply_add<T>(of[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          }
        }
      }
    } else {
#pragma unroll
      for (int chunk = 0; chunk < kStepChunks; ++chunk) {
        float b[4][2][4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int right = 0; right < 2; ++right) {
            const int at = column + 8 * n + 2 * (lane % 4) + right;
            load(reinterpret_cast<const float*>(weight + place<kStepChunks>(at, chunk)),
                 b[n][right]);
          }
        }
#pragma unroll
        for (int m = 0; m < kHigh; ++m) {
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            float a[4];
            const int at = row + 16 * m + 8 * below + lane / 4;
            load(reinterpret_cast<const float*>(x + place<kStepChunks>(at, chunk)), a);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
              for (int n = 0; n < 4; ++n) {
#pragma unroll
                for (int right = 0; right < 2; ++right) {
                  float& sum = of[m][n][2 * below + right];
                  sum = fmaf(a[k], b[n][right][k], sum);
                }
              }
            }
          }
        }
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void load_values(const Values& from, int64_t at, bool whole, int count,
                                            float (&to)[8]) {
  if (from.fp32) {
    load_some(static_cast<const float*>(from.data) + at, whole, count, to);
  } else {
    load_some(static_cast<const T*>(from.data) + at, whole, count, to);
  }
}

// Writes eight columns of a row, of which `count` are there; y holds the products.
template <class T>
__device__ __forceinline__ void finish(const Epilogue& epilogue, int row, int column, int width,
                                       float (&y)[8]) {
  const int count = width - column;
  const bool whole = epilogue.aligned;
  float other[8];
  if (epilogue.bias != nullptr) {
    load_some(static_cast<const T*>(epilogue.bias) + column, whole, count, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] += other[i];
  }
  if (epilogue.activation != Activation::none) {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = activate<T>(epilogue.activation, y[i]);
  }
  if (epilogue.gamma.data != nullptr) {
    load_values<T>(epilogue.gamma, column, whole, count, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] *= other[i];
  }
  if (epilogue.keep.data != nullptr) {
    const int64_t sample = row / epilogue.rows_per_sample;
    const float keep = epilogue.keep.fp32
                           ? static_cast<const float*>(epilogue.keep.data)[sample]
                           : gpu::widen(static_cast<const T*>(epilogue.keep.data)[sample]);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] *= keep;
  }
  int64_t to = row, added = row;
  if (epilogue.period > 0) {
    to = row + static_cast<int64_t>(row / epilogue.period + 1) * epilogue.before;
    added = epilogue.before + row % epilogue.period;
  }
  const int64_t at = to * width + column;
  if (epilogue.residual.data != nullptr) {
    load_values<T>(epilogue.residual, added * epilogue.residual_stride + column, whole, count,
                   other);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] += other[i];
    if (epilogue.residual.fp32) {
      store_some(y, whole, count, static_cast<float*>(epilogue.out) + at);
      return;
    }
  }
  store_some(y, whole, count, static_cast<T*>(epilogue.out) + at);
}

// x: a Matrix, or what brings chunks of its rows as one does.
template <class T, class Tile, class Source>
__global__ void __launch_bounds__(Tile::threads)
    product_kernel(const __grid_constant__ Source x, const __grid_constant__ Matrix<T> weight,
                   const __grid_constant__ Epilogue epilogue) {
  char* const memory = gpu::shared_memory();
  const int thread = gpu::thread(), warp = thread / kWarp, lane = thread % kWarp;
  const int across = (weight.rows + Tile::width - 1) / Tile::width;
  const int row0 = gpu::block() / across * Tile::rows, column0 = gpu::block() % across * Tile::width;
  constexpr int kStep = kStepChunks * kChunk<T>;
  const int steps = (weight.columns + kStep - 1) / kStep;

  const auto bring = [&](int step) {
    char* const slot = memory + step % kSlots * Tile::slot;
    const int row = thread / kStepChunks, chunk = thread % kStepChunks;
    const int column = step * kStep + chunk * kChunk<T>;
    constexpr int kAtOnce = Tile::threads / kStepChunks;
#pragma unroll
    for (int at = 0; at < Tile::rows; at += kAtOnce) {
      x.bring(slot + place<kStepChunks>(at + row, chunk), row0 + at + row, column);
    }
#pragma unroll
    for (int at = 0; at < Tile::width; at += kAtOnce) {
      weight.bring(slot + Tile::rows * kStepBytes + place<kStepChunks>(at + row, chunk),
                   column0 + at + row, column);
    }
  };

  Sums<T, Tile::high> sums;
  sums.clear();
  const int row = warp / Tile::across * Tile::high * 16, column = warp % Tile::across * 32;
#pragma unroll
  for (int step = 0; step < kSlots - 1; ++step) {
    if (step < steps) bring(step);
    gpu::copies_commit();
  }
  for (int step = 0; step < steps; ++step) {
    gpu::copies_wait<kSlots - 2>();
    gpu::block_barrier();
    if (step + kSlots - 1 < steps) bring(step + kSlots - 1);
    gpu::copies_commit();  // a group a step, so that the wait above counts steps
    const char* const slot = memory + step % kSlots * Tile::slot;
    sums.add(slot, row, slot + Tile::rows * kStepBytes, column);
  }

#pragma unroll
  for (int m = 0; m < Tile::high; ++m) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      float pairs[4][2], y[8];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        pairs[n][0] = sums.of[m][n][2 * below];
        pairs[n][1] = sums.of[m][n][2 * below + 1];
      }
      gather_columns(pairs, y);
      const int at = row0 + row + 16 * m + 8 * below + lane / 4;
      const int first = column0 + column + 8 * (lane % 4);
      if (at < x.rows && first < weight.rows) finish<T>(epilogue, at, first, weight.rows, y);
    }
  }
}

template <class T, class Tile, class Source>
const char* launch_tiles(const Source& x, const Matrix<T>& weight, const Epilogue& epilogue,
                         void* stream) {
  const int64_t down = (static_cast<int64_t>(x.rows) + Tile::rows - 1) / Tile::rows;
  const int64_t across = (static_cast<int64_t>(weight.rows) + Tile::width - 1) / Tile::width;
  return gpu::launch(product_kernel<T, Tile, Source>, down * across, Tile::threads, Tile::shared,
                     stream, x, weight, epilogue);
}

using LargeTile = Tile<2, 4, 4>;  // 128 x 128 by 8 warps
using SmallTile = Tile<2, 2, 2>;  // 64 x 64 by 4 warps

// Whether eight columns of everything that the epilogue reads and writes are whole chunks.
template <class T>
bool epilogue_fits(const Epilogue& epilogue, int64_t width) {
  const auto fits = [](const Values& values, int64_t stride) {
    return values.data == nullptr || (values.fp32 ? chunks_fit<float>(values.data, stride, 8)
                                                  : chunks_fit<T>(values.data, stride, 8));
  };
  const bool fp32 = epilogue.residual.data != nullptr && epilogue.residual.fp32;
  return fits({epilogue.bias, false}, 0) && fits(epilogue.gamma, 0) &&
         fits(epilogue.residual, epilogue.residual_stride) && fits({epilogue.out, fp32}, width);
}

}  // namespace deit
