// What the launchers of linear layers and MLPs hand to their kernels (linear.inl, linear_bwd.inl).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"
#include "layer_norm.h"  // kRowChunk
#include "patches.h"

namespace deit {

enum class Activation : int { none, gelu, gelu_tanh, quick_gelu, silu };

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

// Training, of fp32 or bf16 with sums in fp32. Words are as above. Matrices are contiguous unless a
// stride is given, in elements.

// A matrix as the right operand of a product, packed into panels: [width, depth] is a linear
// layer's weight as its forward reads it, [depth, width] as the gradient of its input does.
struct PackArgs {
  const void* b;
  int64_t ldb;
  bool transposed;        // [width, depth], depth whole words
  int64_t depth, width;   // in elements
  float* panels;          // [panels, words of depth, columns]
  Scalar type;
};

// out = epilogue(a b), a task one tile of rows. The epilogue of the forward is
//     affine = a b + bias        out = residual + keep * gamma * activation(affine)
// and with `hidden`, of the hidden layer's gradient
//     out = a b * activation'(hidden)      activated = activation(hidden)
struct TrainingProductArgs {
  const TrainingProductArgs* before;  // the product whose out, kept in cache by tiles, is a; or null
  const float* a;             // [rows, depth] in words, row stride lda; null where there is one before
  int64_t lda;                // in words
  const float* panels;
  int64_t rows, depth, width; // depth in words
  void* out;                  // [rows, width]; null in a product before another
  void* affine;               // [rows, width] or null
  const float* bias;          // [width] or null
  const float* gamma;         // [width] or null
  const float* keep;          // [rows / rows_per_sample] or null
  const void* residual;       // [rows, width] or null
  const void* hidden;         // [rows, width] or null
  void* activated;            // [rows, width] beside hidden, or null
  int64_t rows_per_sample, first_row;
  Scalar type;                // of all but what follows
  Scalar out_type;            // of out and residual: type or f32
  Activation activation;
};

// dweight = gT x and dbias = the sum of g's rows. A task is one block of dweight over all rows.
// No partial sum is shared, and a sum's order is that of the rows whatever the number of threads.
// A dbias alone is a weight without inputs, in blocks of outputs. Rows are those of `samples`
// matrices one after another, each of which begins a chain of its own.
struct WeightGradientArgs {
  const void* g;         // [samples, rows, outputs], strides sample_ldg and ldg
  const void* x;         // [rows, inputs], row stride ldx, of one sample; or null, and
  const Images* images;  // an image a sample, whose patches are the rows
  int64_t sample_ldg, ldg, ldx, samples, rows, outputs, inputs;
  void* dweight;  // [outputs, inputs]; null where inputs is 0
  void* dbias;    // [outputs] or null
  Scalar type;    // of all of them
  int64_t output_block, input_block;
};

// g = keep * gamma * dout * activation'(affine), and partial sums over a chunk's rows of
// keep * dout * activation(affine), dgamma's.
struct OutputGradientArgs {
  const void* dout;     // [rows, channels], row stride ldd
  const void* affine;   // [rows, channels]; null where activation is none and dgamma null
  const float* gamma;   // [channels] or null
  const float* keep;    // [rows / rows_per_sample] or null
  void* g;              // [rows, channels] or null
  float* dgamma;        // [chunks, 2, channels] or null
  Scalar type;          // of affine and g
  Scalar dout_type;     // type or f32
  int64_t ldd, rows, channels, rows_per_sample;
  Activation activation;
};

struct ProductKernels {
  void (*plan)(ProductArgs&, int64_t threads);  // sets row_block, panels and tasks
  size_t (*workspace)(const ProductArgs&);      // floats, one range's
  void (*run)(const ProductArgs&, float* workspace, int64_t begin, int64_t end);
  int64_t panel;  // columns of a packed panel
  void (*pack)(const ProductArgs&, float* packed, int64_t begin, int64_t end);  // of panels
};

struct TrainingProductKernels {
  int64_t panel, row_tile;  // columns of a panel, rows of a task
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);  // of panels
  size_t (*workspace)(const TrainingProductArgs&);            // floats, one range's
  void (*run)(const TrainingProductArgs&, float* workspace, int64_t begin, int64_t end);
};

// The gradients of a linear layer's weight and bias, and of what comes before its epilogue.
struct LinearGradientKernels {
  size_t (*weight_workspace)(const WeightGradientArgs&);  // floats, one range's
  void (*weight)(const WeightGradientArgs&, float* workspace, int64_t begin, int64_t end);
  void (*output)(const OutputGradientArgs&, int64_t begin, int64_t end);  // of chunks of rows
};

}  // namespace deit
