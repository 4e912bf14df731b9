// The few things that kernels ask of a GPU of compute capability 8.0 or later, as functions:
// numbers in half precision, a warp's matrix product and what feeds it, asynchronous copies,
// shuffles, barriers, shared memory, a launch. A kernel written with these alone runs on a CPU,
// too: with DEIT_EMULATED they have a second body, tests/emulated/emulator.h, in which a block's
// threads are fibres, fragments lie in registers as the PTX ISA defines them, and each promise
// that is not kept (a barrier left out, a copy read too early) is seen.
//
// A warp's functions are called by all of its 32 lanes together.
#pragma once

#include <cstdint>

#ifdef DEIT_EMULATED
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace deit {

using f16 = __half;
using bf16 = __nv_bfloat16;

namespace gpu {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(f16 x) { return __half2float(x); }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }

// To nearest, halves to even.
template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline f16 narrow<f16>(float x) { return __float2half_rn(x); }
template <>
__device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

// Two numbers in a register, the first in its low half.
template <class T>
__device__ inline uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<f16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<bf16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 2^x to 2 ulp, 0 for results below 2^-126.
__device__ inline float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of x and 0; NaN stays NaN.
__device__ inline float positive(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int block() { return static_cast<int>(blockIdx.x); }

// The block's bytes of shared memory, as many as it was launched with; nothing is in them.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Waits for all threads of the block; what they wrote before is seen after.
__device__ inline void block_barrier() { __syncthreads(); }

// --- of a warp

// `x` of the lane whose number differs by these bits; of that lane. Neither orders memory.
__device__ inline float shuffle_xor(float x, int bits) {
  return __shfl_xor_sync(0xffffffffu, x, bits);
}
__device__ inline float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four matrices of 8 x 8 numbers of 16 bits from shared memory. Lane 8 i + r names row r of matrix
// i, 16 aligned bytes. Of matrix i a lane receives in words[i] the numbers 2 (lane % 4) and the
// next one of row lane / 4.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the matrices' transposes: numbers of column lane / 4.
__device__ inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = 2 (lane % 4) a lane holds
//   sums  (g, t) (g, t + 1) (g + 8, t) (g + 8, t + 1)
//   a     of rows g, g + 8, g, g + 8: columns t and t + 1, twice, then t + 8 and t + 9
//   b     of column g: rows t and t + 1, then t + 8 and t + 9
template <class T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);
template <>
__device__ inline void multiply_add<f16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<bf16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- of a thread: copies of 16 aligned bytes from memory to shared memory

// Brings the first `bytes` (0 to 16) and zeros for the others. Where they are is undefined until
// the thread has waited; other threads see them behind a barrier after that.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes)
               : "memory");
}

// The thread's copies since the last call are a group.
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of the thread's groups but the newest `kNewest`.
template <int kNewest>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// --- of the host

// Queues `blocks` blocks of `threads` threads with so many bytes of shared memory. Null, or what
// the driver says against it.
template <class... Formal, class... Actual>
const char* launch(void (*kernel)(Formal...), int64_t blocks, int threads, int shared,
                   void* stream, const Actual&... actual) {
  if (blocks > INT32_MAX) return "more than 2^31 - 1 blocks";
  if (shared > 48 * 1024) {  // of more than these the driver wants to be told
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(
      actual...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Multiprocessors of the current device.
inline int processors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

}  // namespace gpu
}  // namespace deit

#endif  // DEIT_EMULATED

namespace deit {

constexpr int kWarp = 32;

// kCount numbers moved by loads and stores of at most 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T lanes[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ void load(const T* from, float (&to)[kCount]) {
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = gpu::widen(pack.lanes[i]);
}

template <class T, int kCount>
__device__ __forceinline__ void store(const float (&from)[kCount], T* to) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.lanes[i] = gpu::narrow<T>(from[i]);
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

}  // namespace deit
