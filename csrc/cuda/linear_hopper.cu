// out = residual + gamma * act(x @ weight.T + bias) on Hopper: one persistent kernel whose warp
// groups have roles. One thread of the first brings tiles of x and weight by the copy engine, four
// steps of the sum ahead; two warp groups multiply, 64 rows of the output tile each, and write
// their half through shared memory by the copy engine. They share nothing but the steps, so one
// may be in its epilogue while the other multiplies.
//
// Blocks are in clusters of two, one tile above the other: they need the same tile of weight, and
// each brings half of it for both. That leaves 32 bytes to bring for each clock of the matrix
// units where 48 would be more than L2 gives (128 x 256 tiles, 64 of the sum at a time).
//
// The kernel's one hazard is a slot of the ring that is written while it is read. A slot is empty
// when both warp groups of both blocks have waited for their products of it; they say so to both
// blocks' barriers, since each block writes into both.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "activations.h"
#include "hopper.h"
#include "linear.h"
#include "wgmma.h"

namespace deit {
namespace {

constexpr int kRows = 128, kDepth = 64;       // of a block's tile, and of a step of the sum
constexpr int kStages = 4, kCluster = 2;
constexpr int kThreads = 384;                 // a warp group that copies, two that multiply
constexpr int kColumns = 64;                  // that a warp group writes at once: 128 bytes a row
constexpr int kRowBytes = 128;                // of a step's or a written row
constexpr int kWritten = 64 * kRowBytes;      // bytes of one copy out; two are under way

constexpr int kXBytes = kRows * kRowBytes;
template <int Width>
constexpr int kStageBytes = kXBytes + Width * kRowBytes;
// 1024 to begin at a multiple of 1024, as the swizzle asks.
template <int Width>
constexpr int kSharedBytes = 1024 + kStages * kStageBytes<Width> + 2 * 2 * kWritten +
                             2 * kStages * 8;

struct Maps {
  CUtensorMap x, weight, out;
};

template <typename T>
struct Epilogue {
  const T* bias;
  const T* gamma;
  const T* residual;
  int64_t residual_stride;
};

__device__ inline float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ inline float2 to_float2(__half2 x) { return __half22float2(x); }

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ inline type of(float a, float b) { return __floats2bfloat162_rn(a, b); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ inline type of(float a, float b) { return __floats2half2_rn(a, b); }
};

__device__ inline float gelu_tanh(float x) {
  const float v = -2.302208198144325f * fmaf(0.044715f * x * x, x, x);  // -2u log2(e)
  return __fdividef(x, 1.0f + gpu::exp2(v));
}

template <Activation A>
__device__ inline float activate(float x) {
  if constexpr (A == Activation::gelu) return gelu_of_half(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh(x);
  return x;
}

// What the epilogue adds to 64 columns of a thread's fragments. It is loaded while the products
// run, or while the columns before are finished.
template <typename T, bool Residual>
struct Added {
  using Two = typename Pair<T>::type;
  Two bias[8], residual[16];

  // Fragment j of a thread: rows `row` and 8 further, columns 8 j + 2 (lane % 4) from `first` on,
  // and the next one (PTX ISA, wgmma's D).
  __device__ void load(const Epilogue<T>& epilogue, int row, int first, int rows, int width) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = first + 8 * j + 2 * (threadIdx.x % 4);
      bias[j] = Pair<T>::of(0.0f, 0.0f);
      if (epilogue.bias != nullptr && column < width)
        bias[j] = __ldg(reinterpret_cast<const Two*>(epilogue.bias + column));
      if constexpr (Residual) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int at = row + 8 * below;
          residual[2 * j + below] = Pair<T>::of(0.0f, 0.0f);
          if (at < rows && column < width)
            residual[2 * j + below] = __ldg(reinterpret_cast<const Two*>(
                epilogue.residual + at * epilogue.residual_stride + column));
        }
      }
    }
  }
};

// The first row of a thread's fragments in its warp group's 64.
__device__ inline int fragment_row() { return 16 * (threadIdx.x % 128 / 32) + threadIdx.x % 32 / 4; }

// A warp group's 64 rows from `row0` of the tile's Width columns from `column0` on, 64 columns at
// a time. `added` holds what the first 64 need.
template <typename T, int Width, Activation A, bool Residual>
__device__ void finish(float (&sums)[Width / 2], Added<T, Residual>& added, const Maps& maps,
                       const Epilogue<T>& epilogue, uint32_t written, uint32_t name, int row0,
                       int column0, int rows, int width) {
  using Two = typename Pair<T>::type;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int part = 0; part < Width / kColumns; ++part) {
    const int first = column0 + part * kColumns;
    const uint32_t slot = written + (part % 2) * kWritten;
    Added<T, Residual> further;
    if (part + 1 < Width / kColumns)
      further.load(epilogue, row0 + fragment_row(), first + kColumns, rows, width);
    uint32_t packed[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = first + 8 * j + 2 * (lane % 4);
      const float2 bias = to_float2(added.bias[j]);
      float2 gamma = {1.0f, 1.0f};
      if (epilogue.gamma != nullptr && column < width)
        gamma = to_float2(__ldg(reinterpret_cast<const Two*>(epilogue.gamma + column)));
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int at = part * (kColumns / 2) + 4 * j + 2 * below;
        float left = gamma.x * activate<A>(sums[at] + bias.x);
        float right = gamma.y * activate<A>(sums[at + 1] + bias.y);
        if constexpr (Residual) {
          const float2 other = to_float2(added.residual[2 * j + below]);
          left += other.x;
          right += other.y;
        }
        const Two pair = Pair<T>::of(left, right);
        packed[2 * j + below] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
    // The copy out of this slot two parts ago must have read it.
    if (thread == 0) hopper::copies_out_read<1>();
    hopper::named_barrier(name, 128);
    const int to = 16 * warp + (lane / 8 % 2) * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const int chunk = (j + lane / 16) ^ (to % 8);  // the swizzle by 128 bytes
      hopper::store_matrices(slot + to * kRowBytes + chunk * 16, packed[2 * j], packed[2 * j + 1],
                             packed[2 * j + 2], packed[2 * j + 3]);
    }
    hopper::fence_for_copies();
    hopper::named_barrier(name, 128);
    if (thread == 0) hopper::copy_out(maps.out, slot, first, row0);
    added = further;
  }
}

template <typename T, int Width, Activation A, bool Residual>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    linear_kernel(const __grid_constant__ Maps maps, const Epilogue<T> epilogue, int rows,
                  int width, int depth) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  const uint32_t base = (hopper::shared_address(memory) + 1023) & ~1023u;
  const uint32_t written = base + kStages * kStageBytes<Width>;
  const uint32_t full = written + 2 * 2 * kWritten, empty = full + kStages * 8;
  const uint32_t rank = hopper::cluster_rank();
  const int group = threadIdx.x / 128;
  const int across = (width + Width - 1) / Width, steps = (depth + kDepth - 1) / kDepth;
  const int tiles = (rows + kCluster * kRows - 1) / (kCluster * kRows) * across;
  const int clusters = gridDim.x / kCluster;

  if (threadIdx.x == 0) {
    hopper::prefetch_map(maps.x);
    hopper::prefetch_map(maps.weight);
    hopper::prefetch_map(maps.out);
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(full + 8 * i, 1);
      hopper::barrier_init(empty + 8 * i, 2 * kCluster);
    }
    hopper::barrier_init_fence();
  }
  hopper::cluster_sync();

  int slot = 0;
  uint32_t parity = 0;  // of the pass over the ring that `slot` is in
  const auto next = [&] {
    if (++slot == kStages) slot = 0, parity ^= 1;
  };
  if (group == 0) {
    hopper::give_registers<40>();
    if (threadIdx.x == 0) {
      constexpr int half = Width / kCluster;
      for (int tile = blockIdx.x / kCluster; tile < tiles; tile += clusters) {
        const int row = (tile / across * kCluster + rank) * kRows, column = tile % across * Width;
        for (int step = 0; step < steps; ++step, next()) {
          const uint32_t x = base + slot * kStageBytes<Width>, weight = x + kXBytes;
          hopper::barrier_wait(empty + 8 * slot, parity ^ 1);
          hopper::barrier_expect(full + 8 * slot, kStageBytes<Width>);
          hopper::copy_in(x, maps.x, full + 8 * slot, step * kDepth, row);
          hopper::copy_in_multicast(weight + rank * half * kRowBytes, maps.weight, full + 8 * slot,
                                    step * kDepth, column + rank * half, (1 << kCluster) - 1);
        }
      }
    }
  } else {
    hopper::take_registers<232>();
    const int half = group - 1;
    const uint32_t mine = written + half * 2 * kWritten;
    const bool announces = threadIdx.x % 128 < kCluster;
    const auto release = [&](int used) {
      if (announces) hopper::barrier_arrive(empty + 8 * used, threadIdx.x % 128);
    };
    float sums[Width / 2];
    for (int tile = blockIdx.x / kCluster; tile < tiles; tile += clusters) {
      const int row = (tile / across * kCluster + rank) * kRows + half * 64;
      const int column = tile % across * Width;
      Added<T, Residual> added;
      added.load(epilogue, row + fragment_row(), column, rows, width);
      int before = -1;  // the slot whose products may still be under way
      for (int step = 0; step < steps; ++step, next()) {
        const uint32_t x = base + slot * kStageBytes<Width>;
        hopper::barrier_wait(full + 8 * slot, parity);
        const uint64_t a = hopper::matrix(x + half * 64 * kRowBytes);
        const uint64_t b = hopper::matrix(x + kXBytes);
        hopper::products_begin();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k)
          hopper::Product<T, Width>::run(sums, a + 2 * k, b + 2 * k, step + k != 0);
        hopper::products_commit();
        hopper::products_wait<1>();
        if (before >= 0) release(before);
        before = slot;
      }
      hopper::products_wait<0>();
      release(before);
      finish<T, Width, A, Residual>(sums, added, maps, epilogue, mine, half + 1, row, column, rows,
                                    width);
    }
    if (threadIdx.x % 128 == 0) hopper::copies_out_read<0>();
  }
  hopper::cluster_sync();  // the other block still writes here, and arrives
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver's, found at run time: the library links no libcuda.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    const bool good = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return good ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// Boxes of box_rows x 64 of a [rows, columns] matrix of half-precision numbers.
bool describe(CUtensorMap& map, Scalar type, const void* data, int64_t rows, int64_t columns,
              int64_t stride, int box_rows) {
  const auto kind =
      type == Scalar::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, apart[] = {1, 1};
  return encoder()(&map, kind, 2, const_cast<void*>(data), sizes, strides, box, apart,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, int Width, Activation A, bool Residual>
cudaError_t launch(const LinearArgs& args, Scalar type, cudaStream_t stream) {
  Maps maps;
  if (encoder() == nullptr) return cudaErrorNotSupported;
  if (!describe(maps.x, type, args.x, args.rows, args.depth, args.x_stride, kRows) ||
      !describe(maps.weight, type, args.weight, args.width, args.depth, args.weight_stride,
                Width / kCluster) ||
      !describe(maps.out, type, args.out, args.rows, args.width, args.width, 64))
    return cudaErrorInvalidValue;
  const auto kernel = linear_kernel<T, Width, A, Residual>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kSharedBytes<Width>);
  if (error != cudaSuccess) return error;
  int device = 0, processors = 0;
  if ((error = cudaGetDevice(&device)) != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t pairs = (args.rows + kCluster * kRows - 1) / (kCluster * kRows);
  const int64_t tiles = pairs * ((args.width + Width - 1) / Width);
  const int clusters = static_cast<int>(std::min<int64_t>(tiles, processors / kCluster));
  const Epilogue<T> epilogue{
      static_cast<const T*>(args.bias), static_cast<const T*>(args.gamma.data),
      static_cast<const T*>(args.residual.data), args.residual_stride};
  kernel<<<clusters * kCluster, kThreads, kSharedBytes<Width>, stream>>>(
      maps, epilogue, static_cast<int>(args.rows), static_cast<int>(args.width),
      static_cast<int>(args.depth));
  return cudaGetLastError();
}

template <typename T, int Width>
cudaError_t by_epilogue(const LinearArgs& args, Scalar type, cudaStream_t stream) {
  const bool residual = args.residual.data != nullptr;
  switch (args.activation) {
    case Activation::gelu:
      return residual ? launch<T, Width, Activation::gelu, true>(args, type, stream)
                      : launch<T, Width, Activation::gelu, false>(args, type, stream);
    case Activation::gelu_tanh:
      return residual ? launch<T, Width, Activation::gelu_tanh, true>(args, type, stream)
                      : launch<T, Width, Activation::gelu_tanh, false>(args, type, stream);
    default:
      return residual ? launch<T, Width, Activation::none, true>(args, type, stream)
                      : launch<T, Width, Activation::none, false>(args, type, stream);
  }
}

// The widest tile that wastes no column: 768 = 3 * 256, 576 = 3 * 192.
template <typename T>
cudaError_t by_width(const LinearArgs& args, Scalar type, cudaStream_t stream) {
  if (args.width % 256 == 0) return by_epilogue<T, 256>(args, type, stream);
  if (args.width % 192 == 0) return by_epilogue<T, 192>(args, type, stream);
  return by_epilogue<T, 128>(args, type, stream);
}

}  // namespace

bool hopper_takes(const LinearArgs& args, Scalar type) {
  const bool known = args.activation == Activation::none || args.activation == Activation::gelu ||
                     args.activation == Activation::gelu_tanh;
  return type != Scalar::f32 && known && args.keep.data == nullptr && !args.gamma.fp32 &&
         !args.residual.fp32 && args.width % 8 == 0 && args.depth % 8 == 0 && args.depth > 0;
}

const char* launch_linear_hopper(const LinearArgs& args, Scalar type, void* to) {
  const auto stream = static_cast<cudaStream_t>(to);
  const cudaError_t error = type == Scalar::f16 ? by_width<__half>(args, type, stream)
                                                : by_width<__nv_bfloat16>(args, type, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace deit
