// The gradient of LayerNorm, alone or with the residual addition before it. Included by
// kernels.cpp.
//
//     xhat = (total - mean) rstd      wdy = weight dout
//     dtotal += rstd (wdy - mean(wdy) - xhat mean(wdy xhat))      dx = keep gamma dtotal
//
// A row stays in L1 between its two passes: what it sums, and what it writes. Its terms of the
// parameters' gradients are added up in fp32 for kGroup rows, in a buffer that stays there too, and
// then join the chunk's exact sums. Those are two loads, two stores and six additions an element:
// with every row joining them, they were half of the time.
//
// Rows go one by one, because memory then sees streams in order. Two or four rows at once take
// fewer instructions and lost on cold inputs (docs/performance.md).
//
// What rounding left of the mean is measured again and taken off, as in the forward: at mean 1000
// and deviation 1 it would put 3e-5 on every xhat.

constexpr int64_t kGroup = 8;

struct RowSums {
  float *weight, *bias, *gamma;  // [D] or null
};

// A row, and what its gradients are made of: with d = total - mean,
//     xhat = rstd d - rest      dtotal += rstd wdy + along d + plain
template <class X, class R>
struct GradientRow {
  const X* dout;
  const R* total;
  const R* dtotal;  // null for a LayerNorm alone
  const X* x;       // null where gamma's gradient is not wanted
  float mean, rstd, rest, along, plain, kept;

  DEIT_INLINE Vec deviation(int64_t j, int lanes) const {
    return load_lanes(total + j, lanes) - broadcast(mean);
  }
};

// Sums over a row. Two of each, added to in turn, are chains of half the length.
struct RowMoments {
  Vec deviation, plain, along;  // of d, wdy and wdy d
};

template <class X, class R>
DEIT_INLINE void add_moments(const GradientRow<X, R>& row, int64_t j, int lanes,
                             const float* weight, RowMoments& sums) {
  Vec d = row.deviation(j, lanes);
  if (lanes < kWidth) d = first(d, lanes);
  const Vec wdy = load_lanes(row.dout + j, lanes) * load_lanes(weight + j, lanes);
  sums.deviation = sums.deviation + d;
  sums.plain = sums.plain + wdy;
  sums.along = fma(wdy, d, sums.along);
}

template <class X, class R>
DEIT_INLINE GradientRow<X, R> measured_row(const LayerNormGradientArgs& args, int64_t row) {
  GradientRow<X, R> r{};
  r.dout = static_cast<const X*>(args.dout.data) + row_offset(args.dout, row);
  r.total = static_cast<const R*>(args.total.data) + row_offset(args.total, row);
  if (args.dtotal.data) {
    r.dtotal = static_cast<const R*>(args.dtotal.data) + row_offset(args.dtotal, row);
  }
  if (args.dgamma) r.x = static_cast<const X*>(args.x.data) + row_offset(args.x, row);
  r.mean = args.mean[row], r.rstd = args.rstd[row];
  r.kept = args.keep ? args.keep[row / args.rows_per_sample] : 1.0f;
  const Vec zero = broadcast(0.0f);
  RowMoments even{zero, zero, zero}, odd{zero, zero, zero};
  int64_t j = 0;
  for (; j + 2 * kWidth <= args.channels; j += 2 * kWidth) {
    add_moments(r, j, kWidth, args.weight, even);
    add_moments(r, j + kWidth, kWidth, args.weight, odd);
  }
  for (; j < args.channels; j += kWidth) {
    const int64_t left = args.channels - j;
    add_moments(r, j, left < kWidth ? static_cast<int>(left) : kWidth, args.weight, even);
  }
  const float count = static_cast<float>(args.channels);
  const float shift = sum(even.deviation + odd.deviation) / count;  // what the rounded mean left
  const float plain = sum(even.plain + odd.plain) / count;
  const float along = r.rstd * (sum(even.along + odd.along) / count - shift * plain);
  r.rest = shift * r.rstd;
  r.along = -r.rstd * r.rstd * along;
  r.plain = r.rstd * (along * r.rest - plain);
  return r;
}

// sums = terms for the first row of a group, += terms for the others.
DEIT_INLINE void add_terms(float* sums, Vec terms, int lanes, bool first_row) {
  store_lanes(sums, first_row ? terms : load_lanes(sums, lanes) + terms, lanes);
}

// dresidual and dx of a row, and its terms of the parameters' gradients.
template <class X, class R>
DEIT_INLINE void write_gradients(const LayerNormGradientArgs& args, int64_t row,
                                 const GradientRow<X, R>& r, const RowSums& group,
                                 bool first_row) {
  R* out = args.dresidual ? static_cast<R*>(args.dresidual) + row * args.channels : nullptr;
  X* dx = args.dx ? static_cast<X*>(args.dx) + row * args.channels : nullptr;
  const Vec rstd = broadcast(r.rstd), along = broadcast(r.along), plain = broadcast(r.plain);
  const Vec rest = broadcast(-r.rest), kept = broadcast(r.kept);
  each_vector(args.channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const Vec d = r.deviation(j, lanes), dy = load_lanes(r.dout + j, lanes);
    if (group.weight) add_terms(group.weight + j, dy * fma(rstd, d, rest), lanes, first_row);
    if (group.bias) add_terms(group.bias + j, dy, lanes, first_row);
    Vec g = fma(rstd, dy * load_lanes(args.weight + j, lanes), fma(along, d, plain));
    if (r.dtotal) g = load_lanes(r.dtotal + j, lanes) + g;
    if (out) store_lanes(out + j, g, lanes);
    g = g * kept;
    if (r.x) add_terms(group.gamma + j, g * load_lanes(r.x + j, lanes), lanes, first_row);
    if (!dx) return;
    if (args.gamma) g = g * load_lanes(args.gamma + j, lanes);
    store_lanes(dx + j, g, lanes);
  });
}

// high + low = terms where they begin, else += terms.
DEIT_INLINE void join(const float* terms, float* high, int64_t low, int64_t channels, bool begin) {
  if (terms == nullptr) return;
  each_vector(channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const Vec more = load_lanes(terms + j, lanes);
    if (!begin) return add_exactly(high + j, high + low + j, more, lanes);
    store_lanes(high + j, more, lanes);
    store_lanes(high + low + j, broadcast(0.0f), lanes);
  });
}

template <class X, class R>
void layer_norm_gradient_typed(const LayerNormGradientArgs& args, float* workspace, int64_t begin,
                               int64_t end) {
  const int64_t channels = args.channels;
  const RowSums group{args.dweight ? workspace : nullptr,
                      args.dbias ? workspace + channels : nullptr,
                      args.dgamma ? workspace + 2 * channels : nullptr};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = args.sums ? args.sums + chunk * 6 * channels : nullptr;
    const int64_t low = 3 * channels, from = chunk * kRowChunk, left = args.rows - from;
    const int64_t to = from + (left < kRowChunk ? left : kRowChunk);
    for (int64_t row = from; row < to; ++row) {
      const int64_t place = (row - from) % kGroup;
      write_gradients(args, row, measured_row<X, R>(args, row), group, place == 0);
      if (place + 1 < kGroup && row + 1 < to) continue;
      const bool first_group = row - from < kGroup;
      join(group.weight, sums, low, channels, first_group);
      join(group.bias, sums + channels, low, channels, first_group);
      join(group.gamma, sums + 2 * channels, low, channels, first_group);
    }
  }
}

template <class X>
void layer_norm_gradient_of(const LayerNormGradientArgs& args, float* workspace, int64_t begin,
                            int64_t end) {
  if (args.total_type == args.x_type) return layer_norm_gradient_typed<X, X>(args, workspace, begin, end);
  layer_norm_gradient_typed<X, float>(args, workspace, begin, end);
}

void layer_norm_gradient(const LayerNormGradientArgs& args, float* workspace, int64_t begin,
                            int64_t end) {
  switch (args.x_type) {
    case Scalar::f32: return layer_norm_gradient_of<float>(args, workspace, begin, end);
    case Scalar::f16: return layer_norm_gradient_of<F16>(args, workspace, begin, end);
    case Scalar::bf16: return layer_norm_gradient_of<BF16>(args, workspace, begin, end);
  }
}

constexpr LayerNormKernels layer_norm_kernels = {layer_norm_workspace, layer_norm,
                                                 layer_norm_gradient};
