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

DEIT_INLINE float mean_of(const float* row, int64_t channels) {
  Vec total[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= channels; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) total[c] = total[c] + load(row + i + c * kWidth);
  }
  for (; i + kWidth <= channels; i += kWidth) total[0] = total[0] + load(row + i);
  const int rest = static_cast<int>(channels - i);
  if (rest > 0) total[1] = total[1] + load_first(row + i, rest);
  return sum(joined(total)) / static_cast<float>(channels);
}

DEIT_INLINE void add_deviation(Vec deviation, Vec& total, Vec& square) {
  total = total + deviation;
  square = fma(deviation, deviation, square);
}

DEIT_INLINE Moments moments(const float* row, int64_t channels, float eps, bool rms) {
  // Squares are summed block by block: with outlier channels 64 apart, which all meet in one
  // lane, a single chain of 48 additions (portable, 768 channels) was off by 4 ulp.
  constexpr int64_t kBlock = 8 * kChains * kWidth;
  const float mean = rms ? 0.0f : mean_of(row, channels);
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
DEIT_INLINE Moments normalise(const float* row, const LayerNormArgs& args, Out* out) {
  const int64_t channels = args.channels;
  const Moments m = moments(row, channels, args.eps, args.rms);
  const Vec mean = broadcast(m.mean), shift = broadcast(m.shift), rstd = broadcast(m.rstd);
  const float* weight = args.weight;
  const float* bias = args.bias;
  int64_t i = 0;
  for (; i + kWidth <= channels; i += kWidth) {
    Vec y = ((load(row + i) - mean) - shift) * rstd;
    y = bias ? fma(y, load(weight + i), load(bias + i)) : y * load(weight + i);
    store(out + i, y);
  }
  const int rest = static_cast<int>(channels - i);
  if (rest > 0) {
    Vec y = ((load_first(row + i, rest) - mean) - shift) * rstd;
    y = y * load_first(weight + i, rest);
    if (bias) y = y + load_first(bias + i, rest);
    store_first(out + i, y, rest);
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
  int64_t i = 0;
  for (; i + kWidth <= channels; i += kWidth) store(scratch + i, load(x + i));
  const int rest = static_cast<int>(channels - i);
  if (rest > 0) store_first(scratch + i, load_first(x + i, rest), rest);
  return scratch;
}

// scratch = residual + keep * gamma * x in fp32, and the same rounded to `sum`. The norm is
// taken of the unrounded one.
template <class X, class R>
DEIT_INLINE void add_row(const X* x, const R* residual, const float* gamma, float keep,
                         int64_t channels, float* scratch, R* sum) {
  const Vec kept = broadcast(keep);
  int64_t i = 0;
  for (; i + kWidth <= channels; i += kWidth) {
    Vec y = load(x + i) * kept;
    if (gamma) y = y * load(gamma + i);
    y = load(residual + i) + y;
    store(scratch + i, y);
    store(sum + i, y);
  }
  const int rest = static_cast<int>(channels - i);
  if (rest > 0) {
    Vec y = load_first(x + i, rest) * kept;
    if (gamma) y = y * load_first(gamma + i, rest);
    y = load_first(residual + i, rest) + y;
    store_first(scratch + i, y, rest);
    store_first(sum + i, y, rest);
  }
}

template <class X>
void layer_norm_rows(const LayerNormArgs& args, float* scratch, int64_t begin, int64_t end) {
  const X* x = static_cast<const X*>(args.x.data);
  X* out = static_cast<X*>(args.out);
  for (int64_t row = begin; row < end; ++row) {
    const float* wide = widen_row(x + row_offset(args.x, row), args.channels, scratch);
    save(normalise(wide, args, out + row * args.channels), args, row);
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
    add_row(x + row_offset(args.x, row), residual + row_offset(args.residual, row), args.gamma,
            keep, args.channels, scratch, total + row * args.channels);
    const float* wide = scratch;
    save(normalise(wide, args, out + row * args.channels), args, row);
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
