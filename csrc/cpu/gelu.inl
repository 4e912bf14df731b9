// GELU (arXiv 1606.08415) and its derivative, exact and by tanh. Included by kernels.cpp.

struct Activated {
  Vec value, slope;
};

// value = x Phi(x), slope = Phi(x) + x phi(x), with phi and Phi the normal density and
// distribution. Phi(-a) = exp(-a^2 / 2) q(u) with u = 1 / (1 + 0.3 a): q is smooth on (0, 1], and
// the polynomial below, fitted for a <= 14.5 to the least relative error, is within 2.4e-9. One
// exponential serves both Phi and phi, and the tail keeps its relative precision, where
// (1 + erf) / 2 cancels.
DEIT_INLINE Activated gelu_erf(Vec x) {
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

// value = x s with s = (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3).
DEIT_INLINE Activated gelu_tanh(Vec x) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const Vec square = x * x;
  const Vec twice = broadcast(1.5957691216f) * fma(x * square, broadcast(0.044715f), x);
  const Vec e = exp_nonpositive(zero - max(zero - twice, twice));
  const Vec inverse = one / (one + e);
  const Vec rest = e * inverse;  // the smaller of s and 1 - s
  const Vec s = twice < zero ? rest : inverse;
  const Vec dtwice = broadcast(1.5957691216f) * fma(square, broadcast(3 * 0.044715f), one);
  return {x * s, fma(x * dtwice, inverse * rest, s)};
}

DEIT_INLINE Activated activate(Vec x, Activation activation) {
  return activation == Activation::gelu_tanh ? gelu_tanh(x) : gelu_erf(x);
}

void output_gradient(const OutputGradientArgs& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first_row = chunk * kRowChunk, channels = args.channels;
    const int64_t left = args.rows - first_row;
    float* sums = args.dgamma ? args.dgamma + chunk * 2 * channels : nullptr;
    for (int64_t i = 0; sums && i < 2 * channels; ++i) sums[i] = 0.0f;
    for (int64_t row = first_row; row < first_row + (left < kRowChunk ? left : kRowChunk); ++row) {
      const Vec kept = broadcast(args.keep ? args.keep[row / args.rows_per_sample] : 1.0f);
      const float* dout = args.dout + row * args.ldd;
      const int64_t at = row * channels;
      each_vector(channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        const Vec dy = load_lanes(dout + j, lanes) * kept;
        Vec g = args.gamma ? dy * load_lanes(args.gamma + j, lanes) : dy;
        Vec y = args.affine ? load_lanes(args.affine + at + j, lanes) : dy;
        if (args.activation != Activation::none) {
          const Activated gelu = activate(y, args.activation);
          y = gelu.value;
          g = g * gelu.slope;
        }
        if (sums) add_exactly(sums + j, sums + channels + j, dy * y, lanes);
        if (args.g) store_lanes(args.g + at + j, g, lanes);
      });
    }
  }
}
