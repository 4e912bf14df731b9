// What the launchers (ops.cpp) and the kernels (kernels.cpp, once per instruction set) share:
// plain data and function pointers. No torch header and no standard container may be included
// from kernels.cpp: an inline function compiled there with AVX-512 could be the copy the linker
// keeps for everyone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"
#include "training.h"

namespace deit {

// LN(residual + keep * gamma * x), and LN(x) where `residual.data` is null. Parameters are fp32.
struct LayerNormArgs {
  Rows x;
  Rows residual;
  Scalar x_type;         // of x and out
  Scalar residual_type;  // of residual and sum
  const float* weight;   // [D]
  const float* bias;     // [D] or null
  const float* gamma;    // [D] or null
  const float* keep;     // [rows / rows_per_sample] or null
  void* out;             // [rows, D], contiguous
  void* sum;             // [rows, D], contiguous; null where residual.data is
  float* mean;           // [rows] for training, or null
  float* rstd;           // [rows]; null where mean is
  int64_t channels;
  int64_t rows_per_sample;
  float eps;
};

struct AttentionArgs {
  const void* qkv;  // [B, N, 3 * H * d], last axis contiguous
  void* out;        // [B, N, H * d], contiguous
  const float* key_bias;  // [B, N], contiguous, or null
  float* lse;             // [B, H, N] for training, or null
  Scalar type;            // of qkv and out
  int64_t batch, tokens, heads, head_dim;
  int64_t stride_batch, stride_token;  // of qkv, in elements
  float scale;
  bool bf16_products;  // round q, k, v and p to bf16 where the set multiplies that faster; fp32 qkv
  int64_t query_tile;  // queries of one task; `tiles` tasks cover N
  int64_t tiles;
};

// out = residual + keep * gamma * act(x wT + bias). Matrices are contiguous. `depth` counts words:
// one fp32 input, or two of bf16.
struct ProductArgs {
  const void* x;         // [rows, depth]
  const void* weight;    // [width, depth]; or its first third, the others where they lie:
  const void* others[2]; // [part, depth] each, or null
  int64_t part;          // rows of each third, a multiple of 16; 0: weight holds all
  const float* packed;   // the same by pack_weight, [panels, depth, columns]; null: packed in the call
  const float* bias;     // [width] or null
  const float* gamma;    // [width] or null
  const float* keep;     // [(first_row + rows) / rows_per_sample] or null
  const void* residual;  // [rows, width] or null
  void* out;             // [rows, width]
  Scalar type;           // of x and weight: f32 or bf16
  Scalar out_type;       // of out and residual: f32 or bf16
  Activation activation;
  int64_t rows, depth, width;
  int64_t first_row, rows_per_sample;
  int64_t row_block;  // rows of one task
  int64_t panels, tasks;
};

// A pre-norm block in inference (kernels/vit_block.py), an image after another: everything between
// x and out stays in the thread's workspace. What differs from image to image is null here.
struct BlockArgs {
  const void* x;          // [images, tokens, channels], contiguous
  void* out;              // the same
  float* row_stats;       // [images, tokens, 2, ceil(channels / 64)]
  LayerNormArgs norm[2];  // weight, bias, eps and channels
  ProductArgs qkv, proj, fc1, fc2;  // all of one type; packed, and planned for an image by one thread
  AttentionArgs attention;          // of one image, planned
};

// One instruction set's kernels. Ranges are [begin, end): of rows, and of tasks.
// Every row and every query is computed by the same arithmetic wherever a range begins, so
// results do not depend on the number of threads.
struct Kernels {
  const char* name;
  size_t (*layer_norm_workspace)(const LayerNormArgs&);  // floats, one range's
  void (*layer_norm)(const LayerNormArgs&, float* workspace, int64_t begin, int64_t end);
  void (*plan_attention)(AttentionArgs&);  // sets query_tile and tiles
  size_t (*attention_workspace)(const AttentionArgs&);
  void (*attention)(const AttentionArgs&, float* workspace, int64_t begin, int64_t end);
  void (*plan_product)(ProductArgs&, int64_t threads);  // sets row_block, panels and tasks
  size_t (*product_workspace)(const ProductArgs&);
  void (*product)(const ProductArgs&, float* workspace, int64_t begin, int64_t end);
  int64_t panel;  // columns of a packed panel
  void (*pack_weight)(const ProductArgs&, float* packed, int64_t begin, int64_t end);  // of panels
  size_t (*block_workspace)(const BlockArgs&);
  void (*block)(const BlockArgs&, float* workspace, int64_t begin, int64_t end);  // of images
  // Rows [begin, end) of x [rows, channels] -> [rows, 2, ceil(channels / 64)]: of every 64 columns
  // the mean and the sum of squares about it.
  void (*row_stats)(const void* x, Scalar type, int64_t channels, float* stats, int64_t begin,
                    int64_t end);
  TrainingKernels training;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

// The best set this processor runs, or the one that was selected.
const Kernels& kernels();

}  // namespace deit
