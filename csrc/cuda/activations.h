// Activations of a product's epilogue. T is the type that the result is rounded to: in half
// precision a few units of fp32 do not count, and the approximate exponential serves.
#pragma once

#include <cmath>

#include "device.h"
#include "epilogue.h"

namespace deit {

// x * Phi(x), by Phi(-|x|) = exp(-x^2 / 2) * R(|x|) with R a polynomial on [0, 5], relative error
// 1.2e-4; as in kernels/device/common.py, whose reasons hold here. NaN stays NaN.
__device__ inline float gelu_of_half(float x) {
  const float a = fminf(fabsf(x), 5.0f), root = 0.8493218002880191f * x;
  float ratio = fmaf(5.790430350316456e-06f, a, -0.0001453153818147257f);
  ratio = fmaf(ratio, a, 0.0015831056516617537f);
  ratio = fmaf(ratio, a, -0.009921562857925892f);
  ratio = fmaf(ratio, a, 0.04025886952877045f);
  ratio = fmaf(ratio, a, -0.11416839063167572f);
  ratio = fmaf(ratio, a, 0.24129194021224976f);
  ratio = fmaf(ratio, a, -0.3972645103931427f);
  ratio = fmaf(ratio, a, 0.4999416470527649f);
  return fmaf(-a * gpu::exp2(-root * root), ratio, gpu::positive(x));
}

// x / (1 + e^-u)
template <class T>
__device__ inline float gated(float x, float u) {
  if constexpr (sizeof(T) == 2) return x / (1.0f + gpu::exp2(-1.4426950408889634f * u));
  return x / (1.0f + expf(-u));
}

template <class T>
__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu:
      if constexpr (sizeof(T) == 2) return gelu_of_half(x);
      return 0.5f * x * erfcf(-0.7071067811865476f * x);
    case Activation::gelu_tanh:
      return gated<T>(x, 1.5957691216057308f * fmaf(0.044715f * x * x, x, x));
    case Activation::quick_gelu: return gated<T>(x, 1.702f * x);
    case Activation::silu: return gated<T>(x, x);
    default: return x;
  }
}

}  // namespace deit
