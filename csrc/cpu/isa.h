// What the launchers (<operator>.cpp) and the kernels (<operator>.inl, in kernels.cpp once per
// instruction set) share: plain data and function pointers, an operator's in its <operator>.h.
//
// A new operator is three files. Its .h has the arguments and the table of its kernels; its .inl
// the kernels, and that table at the end; its .cpp the launcher and the registration. Beside them
// it needs its include and its line in Kernels below, its two lines in kernels.cpp, and a case for
// the sanitizers (tests/native/fuzz.cpp). setup.py compiles every .cpp here.
//
// No torch header and no standard container may be included from kernels.cpp: an inline function
// compiled there with AVX-512 could be the copy the linker keeps for everyone.
#pragma once

#include "attention.h"
#include "cross_attention.h"
#include "layer_norm.h"
#include "linear.h"
#include "losses.h"
#include "vit_block.h"

namespace deit {

// One instruction set's kernels. Ranges are [begin, end): of rows, and of tasks. Every row and
// every query is computed by the same arithmetic wherever a range begins, so results do not depend
// on the number of threads.
struct Kernels {
  const char* name;
  LayerNormKernels layer_norm;
  AttentionKernels attention;
  CrossAttentionKernels cross_attention;
  ProductKernels product;
  TrainingProductKernels training_product;
  LinearGradientKernels linear_gradient;
  LossKernels loss;
  BlockKernels block;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#elif defined(__aarch64__) && defined(__linux__)
extern const Kernels neon_kernels;
extern const Kernels neon_bf16_kernels;
#endif

// The best set this processor runs, or the one that was selected.
const Kernels& kernels();

}  // namespace deit
