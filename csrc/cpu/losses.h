// What the launcher of the losses (cross-entropy, distillation) hands to their kernels (losses.inl).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/rows.h"

namespace deit {

enum class Imitation : int { none, hard, soft };

// [B, C] in a dtype of its own; `rows.data` is null where there is none.
struct Logits {
  Rows rows;
  Scalar type;
};

// What forward and backward read alike. A row's loss is truth * CE(logits, target) + imitation *
// (the student's distance from the teacher).
struct LossInputs {
  Logits logits, teacher;
  Logits student;         // that imitates; none where `logits` do
  Logits probabilities;   // the target; none where it is labels
  const int64_t* labels;  // [B], each in [0, C)
  int64_t label_stride;
  int64_t batch, classes;
  double smoothing;  // the target becomes (1 - smoothing) target + smoothing / C
  double truth, imitation;
  float inverse_temperature;
  Imitation kind;
};

// Rows of the statistics, [3 or 7, B]: of `logits` the pivot, which is their maximum, the sum of
// exp(x - pivot), and the sum of the smoothed target over that, which is rounded once. With a
// teacher: the student's pivot at the temperature, and 1 over its sum; the teacher's label for
// `hard`, else its pivot; 1 over its sum.
constexpr int64_t kCrossEntropyStatistics = 3, kDistillationStatistics = 7;

struct LossArgs {
  LossInputs in;
  double* losses;     // [B]
  float* statistics;  // for the backward, or null
};

// The gradients of `scale` times the sum of the rows' losses.
struct LossGradientArgs {
  LossInputs in;
  const float* statistics;
  double scale;
  void* dlogits;   // [B, C] in logits' dtype, or null
  void* dstudent;  // [B, C] in the student's, or null
};

struct LossKernels {
  size_t (*workspace)(int64_t classes);  // floats, one range's
  void (*forward)(const LossArgs&, float* workspace, int64_t begin, int64_t end);  // of rows
  void (*gradient)(const LossGradientArgs&, float* workspace, int64_t begin, int64_t end);
};

}  // namespace deit
