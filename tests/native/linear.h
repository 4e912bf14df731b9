// What the cases of linear layers share.
#pragma once

#include <cmath>

#include "../../csrc/cpu/linear.h"
#include "fence.h"

namespace fuzz {

using deit::Activation;
constexpr deit::Scalar f32 = deit::Scalar::f32;

struct Activated {
  double value, slope;
};

inline Activated activated(double x, Activation activation) {
  if (activation == Activation::none) return {x, 1.0};
  if (activation == Activation::gelu) {
    const double cdf = 0.5 * std::erfc(-x * std::sqrt(0.5));
    return {x * cdf, cdf + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI)};
  }
  if (activation == Activation::quick_gelu || activation == Activation::silu) {
    const double factor = activation == Activation::silu ? 1.0 : 1.702;
    const double s = 1.0 / (1.0 + std::exp(-factor * x));
    return {x * s, s + factor * x * s * (1.0 - s)};
  }
  const double root = std::sqrt(2.0 / M_PI), t = std::tanh(root * (x + 0.044715 * x * x * x));
  const double dz = root * (1.0 + 3.0 * 0.044715 * x * x);
  return {0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * dz};
}

inline Activation any_activation(Random& random, Activation first = Activation::none) {
  constexpr Activation last = Activation::silu;
  return static_cast<Activation>(random.between(static_cast<int>(first), static_cast<int>(last)));
}

// What training's operands are in.
inline deit::Scalar any_operand(Random& random) {
  return random.chance(0.5) ? deit::Scalar::bf16 : f32;
}

// The row stride of a Strided with one leading axis.
inline int64_t stride_of(const Strided& rows) { return rows.rows.strides[0]; }

}  // namespace fuzz
