// What the launchers of LayerNorm and RMSNorm hand to their kernels (layer_norm.inl,
// layer_norm_bwd.inl).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"

namespace deit {

// LN(residual + keep * gamma * x), and LN(x) where `residual.data` is null. Parameters are fp32.
// With `rms` it is RMSNorm(x) (arXiv 1910.07467): LayerNorm of rows whose mean is taken to be 0.
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
  float* mean;           // [rows] for training, or null; null with rms
  float* rstd;           // [rows] for training, or null
  int64_t channels;
  int64_t rows_per_sample;
  float eps;
  bool rms;
};

// Sums over rows are taken in chunks of this many rows. A chunk writes sums of its own, and beside
// each what rounding took from it.
constexpr int64_t kRowChunk = 64;

// The gradients of LN(total), with dtotal and the branch (x, gamma, keep) where there are any.
// Partial sums over chunks of rows: [chunks, 2, 3, D] for dweight, dbias and dgamma. Sums that
// nobody wants may stay unwritten, and an output that nobody wants is null.
struct LayerNormGradientArgs {
  Rows dout, x, total, dtotal;  // x.data null without dgamma, dtotal.data for a LayerNorm alone
  Scalar x_type;                // of dout, x and dx
  Scalar total_type;            // of total, dtotal and dtotal_out
  const float* weight;          // [D]
  const float* mean;            // [rows]; null for RMSNorm
  const float* rstd;            // [rows]
  const float* gamma;           // [D] or null
  const float* keep;            // [rows / rows_per_sample] or null
  void* dx;                     // [rows, D] or null; null for a LayerNorm alone
  void* dresidual;              // [rows, D] or null: the gradient of total
  float* sums;                  // [chunks, 2, 3, D]; null where none of them is wanted
  bool dweight, dbias, dgamma;  // which are
  int64_t rows, channels, rows_per_sample;
};

struct LayerNormKernels {
  size_t (*workspace)(const LayerNormArgs&);  // floats, one range's
  void (*forward)(const LayerNormArgs&, float* workspace, int64_t begin, int64_t end);  // of rows
  void (*gradient)(const LayerNormGradientArgs&, int64_t begin, int64_t end);  // of chunks of rows
};

}  // namespace deit
