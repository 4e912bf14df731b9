// What the launchers of training (ops_linear.cpp, ops_training.cpp) and its kernels share. Everything
// is plain data, all of it fp32 unless a Scalar says otherwise, and contiguous unless a stride
// is given, in elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"

namespace deit {

enum class Activation : int { none, gelu, gelu_tanh };

// A matrix as the right operand of a product, packed into panels: [width, depth] is a linear
// layer's weight as its forward reads it, [depth, width] as the gradient of its input does.
struct PackArgs {
  const float* b;
  int64_t ldb;
  bool transposed;  // [width, depth]
  int64_t depth, width;
  float* panels;  // panel_floats()
};

// out = epilogue(a b), a task one tile of rows. The epilogue of the forward is
//     affine = a b + bias        out = residual + keep * gamma * activation(affine)
// and with `hidden`, of the hidden layer's gradient
//     out = a b * gelu'(hidden)      activated = gelu(hidden)
struct TrainingProductArgs {
  const TrainingProductArgs* before;  // the product whose out, kept in cache by tiles, is a; or null
  const float* a;             // [rows, depth], row stride lda; null where there is one before
  int64_t lda;
  const float* panels;
  int64_t rows, depth, width;
  float* out;             // [rows, width]; null in a product before another
  float* affine;          // [rows, width] or null
  const float* bias;      // [width] or null
  const float* gamma;     // [width] or null
  const float* keep;      // [rows / rows_per_sample] or null
  const float* residual;  // [rows, width] or null
  const float* hidden;    // [rows, width] or null
  float* activated;       // [rows, width] beside hidden, or null
  int64_t rows_per_sample, first_row;
  Activation activation;
};

// dweight = gT x and dbias = the sum of g's rows. A task is one block of dweight over all rows:
// no partial sum is shared, and its order is that of the rows whatever the number of threads.
// dbias alone is a weight without inputs, in blocks of outputs.
struct WeightGradientArgs {
  const float* g;  // [rows, outputs], row stride ldg
  const float* x;  // [rows, inputs], row stride ldx
  int64_t ldg, ldx, rows, outputs, inputs;
  float* dweight;  // [outputs, inputs]; null where inputs is 0
  float* dbias;    // [outputs] or null
  int64_t output_block, input_block;
};

// Rows are taken in chunks of this many for sums over rows. A chunk writes its sums apart, and with
// each what rounding took from it.
constexpr int64_t kRowChunk = 64;

// g = keep * gamma * dout * activation'(affine), and partial sums over a chunk's rows of
// keep * dout * activation(affine), dgamma's.
struct OutputGradientArgs {
  const float* dout;    // [rows, channels], row stride ldd
  const float* affine;  // [rows, channels]; null where activation is none and dgamma null
  const float* gamma;   // [channels] or null
  const float* keep;    // [rows / rows_per_sample] or null
  float* g;             // [rows, channels] or null
  float* dgamma;        // [chunks, 2, channels] or null
  int64_t ldd, rows, channels, rows_per_sample;
  Activation activation;
};

// The gradients of LN(total), with dtotal and the branch (x, gamma, keep) where there are any.
// Partial sums over chunks of rows: [chunks, 2, 3, D] for dweight, dbias and dgamma, of which those
// that nobody wants stay 0. What is written is null where nobody wants it.
struct LayerNormGradientArgs {
  Rows dout, x, total, dtotal;  // x.data null without dgamma, dtotal.data for a LayerNorm alone
  Scalar x_type;                // of dout, x and dx
  Scalar total_type;            // of total, dtotal and dtotal_out
  const float* weight;          // [D]
  const float* mean;            // [rows]
  const float* rstd;            // [rows]
  const float* gamma;           // [D] or null
  const float* keep;            // [rows / rows_per_sample] or null
  void* dx;                     // [rows, D] or null; null for a LayerNorm alone
  void* dresidual;              // [rows, D] or null: the gradient of total
  float* sums;                  // [chunks, 2, 3, D]; null where none of them is wanted
  bool dweight, dbias, dgamma;  // which are
  int64_t rows, channels, rows_per_sample;
};

struct AttentionGradientArgs {
  const void* qkv;        // [B, N, 3 * H * d], last axis contiguous
  const void* dout;       // [B, N, H * d], last axis contiguous
  void* dqkv;             // [B, N, 3 * H * d]
  const float* key_bias;  // [B, N] or null
  Scalar type;
  int64_t batch, tokens, heads, head_dim;
  int64_t stride_batch, stride_token;            // of qkv
  int64_t dout_stride_batch, dout_stride_token;  // of dout
  float scale;
  int64_t query_tile;
};

// One instruction set's kernels for training, as in Kernels: ranges are [begin, end) of tasks,
// each computed alike wherever a range begins.
struct TrainingKernels {
  int64_t panel, row_tile;                         // columns of a panel, rows of a product's task
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);  // of panels
  size_t (*product_workspace)(const TrainingProductArgs&);
  void (*product)(const TrainingProductArgs&, float* workspace, int64_t begin, int64_t end);
  size_t (*weight_gradient_workspace)(const WeightGradientArgs&);
  void (*weight_gradient)(const WeightGradientArgs&, float* workspace, int64_t begin, int64_t end);
  void (*output_gradient)(const OutputGradientArgs&, int64_t begin, int64_t end);  // of chunks
  void (*layer_norm_gradient)(const LayerNormGradientArgs&, int64_t begin, int64_t end);
  void (*plan_attention_gradient)(AttentionGradientArgs&);  // sets query_tile
  size_t (*attention_gradient_workspace)(const AttentionGradientArgs&);
  void (*attention_gradient)(const AttentionGradientArgs&, float* workspace, int64_t begin,
                             int64_t end);  // of heads
};

}  // namespace deit
