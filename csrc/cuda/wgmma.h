// D += A B of a warp group: D 64 x N in fp32 registers, A 64 x 16 and B N x 16 in shared memory
// (hopper::matrix). The instruction spells every register out; the text is the same for each N.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper.h"

namespace deit::hopper {

template <typename T, int N>
struct Product;

// The registers of D, 64, 96 or 128 of them, by the names that the text has for them.
#define DEIT_NAMES_64                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                           \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"               \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DEIT_NAMES_96 DEIT_NAMES_64                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"               \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DEIT_NAMES_128 DEIT_NAMES_96                                                               \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"   \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// The same as operands of the text.
#define DEIT_SUMS_8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),      \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define DEIT_SUMS_32(i) DEIT_SUMS_8(i), DEIT_SUMS_8(i + 8), DEIT_SUMS_8(i + 16), DEIT_SUMS_8(i + 24)
#define DEIT_SUMS_64 DEIT_SUMS_32(0), DEIT_SUMS_32(32)
#define DEIT_SUMS_96 DEIT_SUMS_64, DEIT_SUMS_32(64)
#define DEIT_SUMS_128 DEIT_SUMS_96, DEIT_SUMS_32(96)

// COUNT: registers of D, N / 2. A, B, ADD: the numbers of the operands behind them.
#define DEIT_PRODUCT(T, TYPE, N, COUNT, A, B, ADD)                                                 \
  template <>                                                                                      \
  struct Product<T, N> {                                                                           \
    static __device__ inline void run(float (&d)[COUNT], uint64_t a, uint64_t b, int add) {        \
      asm volatile(                                                                                \
          "{\n"                                                                                    \
          ".reg .pred add;\n"                                                                      \
          "setp.ne.b32 add, %" #ADD ", 0;\n"                                                       \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DEIT_NAMES_##COUNT  \
          "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n"                                                \
          "}"                                                                                      \
          : DEIT_SUMS_##COUNT                                                                      \
          : "l"(a), "l"(b), "r"(add));                                                             \
    }                                                                                              \
  }

DEIT_PRODUCT(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66);
DEIT_PRODUCT(__half, "f16", 128, 64, 64, 65, 66);
DEIT_PRODUCT(__nv_bfloat16, "bf16", 192, 96, 96, 97, 98);
DEIT_PRODUCT(__half, "f16", 192, 96, 96, 97, 98);
DEIT_PRODUCT(__nv_bfloat16, "bf16", 256, 128, 128, 129, 130);
DEIT_PRODUCT(__half, "f16", 256, 128, 128, 129, 130);

}  // namespace deit::hopper
