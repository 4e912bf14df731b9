// GELU, x Phi(x) (arXiv 1606.08415), its form by tanh, and what else is x times a sigmoid: SiLU,
// x / (1 + exp(-x)), and QuickGELU, the same of 1.702 x. Included by kernels.cpp and
// int8_kernels.cpp.
//
// GELU by erf is there three times, because its callers need different things of it. On a Zen 4 core, ns for a
// vector of 16 with AVX-512 and for one of 8 with AVX2, and the error as a norm over |x| < 3:
//   gelu             inference: the value alone                    9.0   6.6   2.6e-8
//   with_slope       training: the value and the derivative       11.1   7.9   3.1e-8
//   coarse_gelu      before a quantisation to 8 bits               7.9   4.6   1.7e-7
// Training's forward calls the second for the value alone (10.4 and 7.6 ns): what its backward
// computes again is then what the forward computed, bit for bit.

// The value is max(0, x) - |x| * q with q the tail of the distribution beyond |x|: nothing cancels.
// |x| is cut where q < 1e-34, so that no product of it is denormal (100 cycles and more) or
// infinity times 0.
DEIT_INLINE Vec cut_magnitude(Vec x) {
  return min(broadcast(12.5f), max(broadcast(0.0f) - x, x));
}

// With z = |x| / sqrt(2), the tail erfc(z) / 2 is exp(-z^2) * P(u), u = (z / 2) / (1 + z / 2), P of
// degree 6 with P(0) = 1/2, fitted by iteratively reweighted least squares to within 4.5e-9 of the
// tail. Normal x: error 3.0e-8 as a norm, where PyTorch's is 6.2e-8.
DEIT_INLINE Vec gelu(Vec x) {
  const Vec magnitude = cut_magnitude(x);
  const Vec v = magnitude * broadcast(0.353553391f);
  const Vec u = v / (broadcast(1.0f) + v);
  Vec p = broadcast(0.0514108092f);
  p = fma(p, u, broadcast(0.00326142902f));
  p = fma(p, u, broadcast(-0.156379789f));
  p = fma(p, u, broadcast(-0.137154579f));
  p = fma(p, u, broadcast(0.87160027f));
  p = fma(p, u, broadcast(-1.12837863f));
  p = fma(p, u, broadcast(0.5f));
  const Vec tail = exp_nonpositive(magnitude * magnitude * broadcast(-0.5f)) * p;
  return max(broadcast(0.0f), x) - magnitude * tail;
}

// x / (1 + exp(-2 s)) with s = sqrt(2 / pi) * (x + 0.044715 x^3); the tail is e / (1 + e) with
// e = exp(-2 |s|). It falls faster: |x| is cut at 9.5.
DEIT_INLINE Vec gelu_tanh(Vec x) {
  const Vec magnitude = min(broadcast(9.5f), cut_magnitude(x));
  const Vec cubic = fma(magnitude * magnitude, broadcast(0.0713548163f), broadcast(1.59576912f));
  const Vec e = exp_nonpositive(broadcast(0.0f) - magnitude * cubic);
  return max(broadcast(0.0f), x) - magnitude * (e / (broadcast(1.0f) + e));
}

// x / (1 + exp(-factor x)): the tail is e / (1 + e) with e = exp(-factor |x|). |x| is cut where no
// product of e is denormal.
DEIT_INLINE Vec times_sigmoid(Vec x, float factor) {
  const Vec magnitude = min(broadcast(80.0f / factor), max(broadcast(0.0f) - x, x));
  const Vec e = exp_nonpositive(magnitude * broadcast(-factor));
  return max(broadcast(0.0f), x) - magnitude * (e / (broadcast(1.0f) + e));
}

constexpr float kQuickGelu = 1.702f;

template <Activation kActivation>
DEIT_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::gelu) return gelu(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::quick_gelu) return times_sigmoid(x, kQuickGelu);
  if constexpr (kActivation == Activation::silu) return times_sigmoid(x, 1.0f);
  return x;
}

struct Activated {
  Vec value, slope;
};

// value = x Phi(x), slope = Phi(x) + x phi(x), with phi and Phi the normal density and
// distribution. Phi(-a) = exp(-a^2 / 2) q(u) with u = 1 / (1 + 0.3 a): q is smooth on (0, 1], and
// the polynomial below, fitted for a <= 14.5 to the least relative error, is within 2.4e-9. One
// exponential serves both Phi and phi, and the tail keeps its relative precision, where
// (1 + erf) / 2 cancels.
DEIT_INLINE Activated gelu_erf_with_slope(Vec x) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const Vec a = max(zero - x, x);
  const Vec density = exp_nonpositive(broadcast(-0.5f) * x * x);
  const Vec u = one / fma(a, broadcast(0.3f), one);
  Vec q = broadcast(0.00192808476f);
  q = fma(q, u, broadcast(-0.032076478f));
  q = fma(q, u, broadcast(0.14227742f));
  q = fma(q, u, broadcast(-0.273037851f));
  q = fma(q, u, broadcast(0.234676331f));
  q = fma(q, u, broadcast(-0.106683686f));
  q = fma(q, u, broadcast(0.107785001f));
  q = fma(q, u, broadcast(0.0751094446f));
  q = fma(q, u, broadcast(0.110819921f));
  q = fma(q, u, broadcast(0.119512498f));
  q = fma(q, u, broadcast(0.119689293f));
  const Vec tail = density * (q * u);
  const Vec cdf = x < zero ? tail : one - tail;
  return {x * cdf, fma(x * broadcast(0.3989422804f), density, cdf)};
}

// value = x s with s = 1 / (1 + exp(-z)), z and its derivative dz given. GELU by tanh is of this
// form: (1 + tanh(z / 2)) / 2 is s.
DEIT_INLINE Activated sigmoid_with_slope(Vec x, Vec z, Vec dz) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const Vec e = exp_nonpositive(zero - max(zero - z, z));
  const Vec inverse = one / (one + e);
  const Vec rest = e * inverse;  // the smaller of s and 1 - s
  const Vec s = z < zero ? rest : inverse;
  return {x * s, fma(x * dz, inverse * rest, s)};
}

DEIT_INLINE Activated activate_with_slope(Vec x, Activation activation) {
  if (activation == Activation::gelu) return gelu_erf_with_slope(x);
  Vec z = x, dz = broadcast(1.0f);
  if (activation == Activation::gelu_tanh) {
    const Vec square = x * x;  // z = 2 sqrt(2 / pi) (x + 0.044715 x^3)
    z = broadcast(1.5957691216f) * fma(x * square, broadcast(0.044715f), x);
    dz = broadcast(1.5957691216f) * fma(square, broadcast(3 * 0.044715f), dz);
  } else if (activation == Activation::quick_gelu) {
    z = x * broadcast(kQuickGelu);
    dz = broadcast(kQuickGelu);
  }
  return sigmoid_with_slope(x, z, dz);
}

// Within 3e-6 of the exact GELU: Phi(x) = 1/2 + x * P(2 x^2 / 25 - 1) for |x| <= 5, a polynomial of
// least maximal error there; beyond, Phi is 0 or 1 to 3e-7. 20 instructions, where `gelu` has 30.
// What is quantised next has steps a thousand times that error.
DEIT_INLINE Vec coarse_gelu(Vec x) {
  constexpr float kTerms[] = {
      0.141363785f, -0.0702966377f, 0.0515214466f, -0.0404332988f, 0.0314260907f,
      -0.0233338308f, 0.0164970215f, -0.0109826727f, 0.00617016992f, -0.00290268008f,
      0.00199330924f, -0.00152047537f, 0.000497735804f};
  constexpr int kDegree = static_cast<int>(sizeof kTerms / sizeof kTerms[0]) - 1;
  const Vec inside = max(broadcast(-5.0f), min(broadcast(5.0f), x));
  const Vec u = fma(inside * inside, broadcast(0.08f), broadcast(-1.0f));
  Vec p = broadcast(kTerms[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) p = fma(p, u, broadcast(kTerms[i]));
  return x * max(broadcast(0.0f), fma(p, inside, broadcast(0.5f)));
}
