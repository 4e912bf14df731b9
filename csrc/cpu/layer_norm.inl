// LayerNorm (arXiv 1607.06450) of a row, alone or after a residual addition, and RMSNorm. Included
// by kernels.cpp.
//
// A row stays in the first-level cache between its three passes (768 channels: 3 KB), so the
// two-pass variance costs no memory traffic. Deviations are summed again and their mean taken
// off: a row of mean 1000 and deviation 1 keeps fp32's full precision, where the rounding of
// the mean alone would cost 4e-5.

struct Moments {
  float mean;
  float shift;  // what the rounded mean left: subtract it from x - mean
  float rstd;
};

constexpr int kChains = 4;  // independent sums, to cover the adder's latency

DEIT_INLINE Vec joined(const Vec (&chains)[kChains]) {
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// The mean of the vectors that value(i, lanes) makes, zeros in the lanes past `lanes`.
template <class F>
DEIT_INLINE float mean_of(int64_t channels, F&& value) {
  Vec total[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= channels; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) total[c] = total[c] + value(i + c * kWidth, kWidth);
  }
  for (; i + kWidth <= channels; i += kWidth) total[0] = total[0] + value(i, kWidth);
  const int rest = static_cast<int>(channels - i);
  if (rest > 0) total[1] = total[1] + value(i, rest);
  return sum(joined(total)) / static_cast<float>(channels);
}

DEIT_INLINE float mean_of(const float* row, int64_t channels) {
  return mean_of(channels, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    return load_lanes(row + i, lanes);
  });
}

DEIT_INLINE void add_deviation(Vec deviation, Vec& total, Vec& square) {
  total = total + deviation;
  square = fma(deviation, deviation, square);
}

// mean: the row's, and 0 for RMSNorm.
DEIT_INLINE Moments moments(const float* row, int64_t channels, float mean, float eps, bool rms) {
  // Squares are summed block by block: with outlier channels 64 apart, which all meet in one
  // lane, a single chain of 48 additions (portable, 768 channels) was off by 4 ulp.
  constexpr int64_t kBlock = 8 * kChains * kWidth;
  const Vec center = broadcast(mean);
  Vec total = broadcast(0.0f), square = broadcast(0.0f);
  for (int64_t i = 0; i < channels;) {
    const int64_t end = channels - i < kBlock ? channels : i + kBlock;
    Vec t[kChains] = {}, s[kChains] = {};
    for (; i + kChains * kWidth <= end; i += kChains * kWidth) {
      for (int c = 0; c < kChains; ++c) {
        add_deviation(load(row + i + c * kWidth) - center, t[c], s[c]);
      }
    }
    for (; i + kWidth <= end; i += kWidth) add_deviation(load(row + i) - center, t[0], s[0]);
    const int rest = static_cast<int>(end - i);
    if (rest > 0) add_deviation(first(load_first(row + i, rest) - center, rest), t[1], s[1]);
    total = total + joined(t);
    square = square + joined(s);
    i = end;
  }
  const float count = static_cast<float>(channels);
  const float shift = rms ? 0.0f : sum(total) / count;
  const float variance = sum(square) / count - shift * shift;
  const float spread = variance < 0.0f ? 0.0f : variance;  // NaN stays NaN
  return {mean, shift, 1.0f / __builtin_sqrtf(spread + eps)};
}

template <class Out>
DEIT_INLINE Moments normalise(const float* row, float mean, const LayerNormArgs& args, Out* out) {
  const int64_t channels = args.channels;
  const Moments m = moments(row, channels, mean, args.eps, args.rms);
  const Vec center = broadcast(m.mean), rstd = broadcast(m.rstd);
  const Vec shift = broadcast(-m.shift * m.rstd);
  const auto value = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const Vec y = fma(load_lanes(row + i, lanes) - center, rstd, shift);
    const Vec weight = load_lanes(args.weight + i, lanes);
    return args.bias ? fma(y, weight, load_lanes(args.bias + i, lanes)) : y * weight;
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= channels; i += 2 * kWidth) {
    store_two(out + i, value(i, kWidth), value(i + kWidth, kWidth));
  }
  for (; i < channels; i += kWidth) {
    const int lanes = static_cast<int>(channels - i < kWidth ? channels - i : kWidth);
    store_lanes(out + i, value(i, lanes), lanes);
  }
  return m;
}

// For the backward, which measures `shift` again.
DEIT_INLINE void save(const Moments& m, const LayerNormArgs& args, int64_t row) {
  if (args.rstd == nullptr) return;
  if (args.mean) args.mean[row] = m.mean;
  args.rstd[row] = m.rstd;
}

DEIT_INLINE int64_t row_offset(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return rows.dims ? offset + row * rows.strides[0] : 0;
}

// The row in fp32: in place where it is fp32 already, else widened into `scratch`.
DEIT_INLINE const float* widen_row(const float* x, int64_t, float*) { return x; }

template <class T>
DEIT_INLINE const float* widen_row(const T* x, int64_t channels, float* scratch) {
  each_vector(channels, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    store_lanes(scratch + i, load_lanes(x + i, lanes), lanes);
  });
  return scratch;
}

// The same with its mean, in one pass.
struct WideRow {
  const float* values;
  float mean;
};

DEIT_INLINE WideRow widen_and_mean(const float* x, int64_t channels, float*) {
  return {x, mean_of(x, channels)};
}

template <class T>
DEIT_INLINE WideRow widen_and_mean(const T* x, int64_t channels, float* scratch) {
  const float mean = mean_of(channels, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const Vec y = load_lanes(x + i, lanes);
    store_lanes(scratch + i, y, lanes);
    return y;
  });
  return {scratch, mean};
}

// scratch = residual + keep * gamma * x in fp32, the same rounded to `sum`, and its mean. The norm
// is taken of the unrounded one.
template <class X, class R>
DEIT_INLINE float add_row(const X* x, const R* residual, const float* gamma, float keep,
                          int64_t channels, float* scratch, R* sum) {
  const Vec kept = broadcast(keep);
  return mean_of(channels, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vec y = load_lanes(x + i, lanes) * kept;
    if (gamma) y = y * load_lanes(gamma + i, lanes);
    y = load_lanes(residual + i, lanes) + y;
    store_lanes(scratch + i, y, lanes);
    store_lanes(sum + i, y, lanes);
    return lanes == kWidth ? y : first(y, lanes);
  });
}

template <class X>
void layer_norm_rows(const LayerNormArgs& args, float* scratch, int64_t begin, int64_t end) {
  const X* x = static_cast<const X*>(args.x.data);
  X* out = static_cast<X*>(args.out);
  for (int64_t row = begin; row < end; ++row) {
    const X* from = x + row_offset(args.x, row);
    const WideRow wide = args.rms ? WideRow{widen_row(from, args.channels, scratch), 0.0f}
                                  : widen_and_mean(from, args.channels, scratch);
    save(normalise(wide.values, wide.mean, args, out + row * args.channels), args, row);
  }
}

template <class X, class R>
void add_layer_norm_rows(const LayerNormArgs& args, float* scratch, int64_t begin, int64_t end) {
  const X* x = static_cast<const X*>(args.x.data);
  const R* residual = static_cast<const R*>(args.residual.data);
  X* out = static_cast<X*>(args.out);
  R* total = static_cast<R*>(args.sum);
  for (int64_t row = begin; row < end; ++row) {
    const float keep = args.keep ? args.keep[row / args.rows_per_sample] : 1.0f;
    const float mean = add_row(x + row_offset(args.x, row),
                               residual + row_offset(args.residual, row), args.gamma, keep,
                               args.channels, scratch, total + row * args.channels);
    const float* wide = scratch;
    save(normalise(wide, args.rms ? 0.0f : mean, args, out + row * args.channels), args, row);
  }
}

template <class X>
void layer_norm_typed(const LayerNormArgs& args, float* scratch, int64_t begin, int64_t end) {
  if (args.residual.data == nullptr) return layer_norm_rows<X>(args, scratch, begin, end);
  if (args.residual_type == args.x_type) {
    return add_layer_norm_rows<X, X>(args, scratch, begin, end);
  }
  add_layer_norm_rows<X, float>(args, scratch, begin, end);
}

void layer_norm(const LayerNormArgs& args, float* scratch, int64_t begin, int64_t end) {
  switch (args.x_type) {
    case Scalar::f32: return layer_norm_typed<float>(args, scratch, begin, end);
    case Scalar::f16: return layer_norm_typed<F16>(args, scratch, begin, end);
    case Scalar::bf16: return layer_norm_typed<BF16>(args, scratch, begin, end);
  }
}

size_t layer_norm_workspace(const LayerNormArgs& args) {
  return static_cast<size_t>(args.channels);
}
