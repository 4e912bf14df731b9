// The gradient of LayerNorm, alone or with the residual addition before it, and of RMSNorm.
// Included by kernels.cpp.
//
//     xhat = rstd (total - mean)      wdy = weight dout
//     dtotal += rstd (wdy - mean(wdy) - xhat mean(wdy xhat))      dx = keep gamma dtotal
//
// RMSNorm's has neither mean, that of total or that of wdy, in it. What rounding left of the mean is
// measured again and taken off, as in the forward: at mean 1000 and deviation 1 it would put 3e-5 on
// every xhat.
//
// Memory is the bound: a pass that reads and writes what this does takes as long. While rows stream
// in, a load that the first-level cache misses waits behind them, 10 ns in place of 4. So a pass
// over a row writes one thing, and touches no more than that cache holds beside the rows that come:
// up to kNarrow channels every row joins the parameters' sums, 16 bytes a channel. Of wider rows,
// and behind an addition, whose five streams leave less room, the sums are taken when a chunk has
// been written, column by column in registers.

constexpr int64_t kNarrow = 384;
constexpr int64_t kExact = 4;  // rows whose terms are added up before they join an exact sum

struct RowSums {
  float *weight, *bias, *gamma;  // [D] or null, and what rounding took from each at `low` past it
  int64_t low;
};

// A row, and what its gradients are made of:
//     xhat = rstd (total - mean) + rest      dtotal += rstd wdy + along xhat + plain
template <class X, class R>
struct GradientRow {
  const X* dout;
  const R* total;
  const R* dtotal;  // null for a LayerNorm alone
  const X* x;       // null where gamma's gradient is not wanted
  float mean, rstd, rest, along, plain, kept;

  DEIT_INLINE Vec xhat(int64_t j, int lanes) const {
    return fma(load_lanes(total + j, lanes) - broadcast(mean), broadcast(rstd), broadcast(rest));
  }
  // Of total, the addition's included.
  template <bool added>
  DEIT_INLINE Vec gradient(const float* weight, int64_t j, int lanes) const {
    const Vec wdy = load_lanes(dout + j, lanes) * load_lanes(weight + j, lanes);
    const Vec g = fma(wdy, broadcast(rstd),
                      fma(xhat(j, lanes), broadcast(along), broadcast(plain)));
    return added ? load_lanes(dtotal + j, lanes) + g : g;
  }
};

struct RowMoments {
  Vec deviation, plain, along;  // of d = total - mean, wdy and wdy d
};

template <class X, class R>
DEIT_INLINE void add_moments(const GradientRow<X, R>& row, const float* weight, int64_t j,
                             int lanes, RowMoments& sums) {
  Vec d = load_lanes(row.total + j, lanes) - broadcast(row.mean);
  if (lanes < kWidth) d = first(d, lanes);
  const Vec wdy = load_lanes(row.dout + j, lanes) * load_lanes(weight + j, lanes);
  sums.deviation = sums.deviation + d;
  sums.plain = sums.plain + wdy;
  sums.along = fma(wdy, d, sums.along);
}

template <class X, class R>
DEIT_INLINE GradientRow<X, R> measured_row(const LayerNormGradientArgs& args, int64_t row) {
  const int64_t channels = args.channels;
  const bool rms = args.mean == nullptr;
  GradientRow<X, R> r{};
  r.dout = static_cast<const X*>(args.dout.data) + row_offset(args.dout, row);
  r.total = static_cast<const R*>(args.total.data) + row_offset(args.total, row);
  if (args.dtotal.data) {
    r.dtotal = static_cast<const R*>(args.dtotal.data) + row_offset(args.dtotal, row);
  }
  if (args.dgamma) r.x = static_cast<const X*>(args.x.data) + row_offset(args.x, row);
  r.mean = rms ? 0.0f : args.mean[row];
  r.rstd = args.rstd[row];
  r.kept = args.keep ? args.keep[row / args.rows_per_sample] : 1.0f;
  const Vec zero = broadcast(0.0f);
  RowMoments even{zero, zero, zero}, odd{zero, zero, zero};
  int64_t j = 0;
  for (; j + 2 * kWidth <= channels; j += 2 * kWidth) {
    add_moments(r, args.weight, j, kWidth, even);
    add_moments(r, args.weight, j + kWidth, kWidth, odd);
  }
  for (; j < channels; j += kWidth) {
    const int64_t left = channels - j;
    add_moments(r, args.weight, j, left < kWidth ? static_cast<int>(left) : kWidth, even);
  }
  const float count = static_cast<float>(channels);
  const float shift = rms ? 0.0f : sum(even.deviation + odd.deviation) / count;
  const float plain = sum(even.plain + odd.plain) / count;
  const float along = r.rstd * (sum(even.along + odd.along) / count - shift * plain);
  r.rest = -shift * r.rstd;
  r.along = -r.rstd * along;
  r.plain = rms ? 0.0f : -r.rstd * plain;
  return r;
}

// Adds a row's terms to those of the weight's and the bias's sums that are wanted.
template <class X, class R>
DEIT_INLINE void add_row_terms(const LayerNormGradientArgs& args, const GradientRow<X, R>& row,
                               const RowSums& sums) {
  each_vector(args.channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const Vec dy = load_lanes(row.dout + j, lanes);
    if (sums.weight) {
      add_exactly(sums.weight + j, sums.weight + sums.low + j, dy * row.xhat(j, lanes), lanes);
    }
    if (sums.bias) add_exactly(sums.bias + j, sums.bias + sums.low + j, dy, lanes);
  });
}

template <bool added, class X, class R>
DEIT_INLINE void write_row(const LayerNormGradientArgs& args, int64_t row,
                           const GradientRow<X, R>& r) {
  R* out = args.dresidual ? static_cast<R*>(args.dresidual) + row * args.channels : nullptr;
  X* dx = args.dx ? static_cast<X*>(args.dx) + row * args.channels : nullptr;
  if (!out && !dx) return;
  each_vector(args.channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    Vec g = r.template gradient<added>(args.weight, j, lanes);
    if (out) store_lanes(out + j, g, lanes);
    if (!added || !dx) return;
    g = g * broadcast(r.kept);
    if (args.gamma) g = g * load_lanes(args.gamma + j, lanes);
    store_lanes(dx + j, g, lanes);
  });
}

// to[i] += sums of the terms[i] that add(row, terms) adds to, exactly, for each of `rows` rows.
template <int count, class F>
DEIT_INLINE void sum_rows(int64_t rows, float* const (&to)[count], int64_t low, int lanes, F&& add) {
  Vec total[count] = {}, lost[count] = {};
  for (int64_t i = 0; i < rows; i += kExact) {
    const int64_t end = rows - i < kExact ? rows : i + kExact;
    Vec terms[count] = {};
    for (int64_t k = i; k < end; ++k) add(k, terms);
    for (int c = 0; c < count; ++c) add_exactly(total[c], lost[c], terms[c]);
  }
  for (int c = 0; c < count; ++c) {
    if (to[c] == nullptr) continue;
    store_lanes(to[c], total[c], lanes);
    store_lanes(to[c] + low, lost[c], lanes);
  }
}

// Writes the sums of a chunk's rows that are wanted.
template <bool added, class X, class R>
DEIT_INLINE void sum_chunk(const LayerNormGradientArgs& args, const GradientRow<X, R>* row,
                           int64_t rows, const RowSums& sums) {
  const auto at = [](float* sum, int64_t j) { return sum ? sum + j : nullptr; };
  each_vector(args.channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    float* const to[] = {at(sums.weight, j), at(sums.bias, j)};
    sum_rows(rows, to, sums.low, lanes, [&](int64_t i, Vec* terms) __attribute__((always_inline)) {
      const Vec dy = load_lanes(row[i].dout + j, lanes);
      terms[0] = fma(dy, row[i].xhat(j, lanes), terms[0]);
      terms[1] = terms[1] + dy;
    });
    if (!added || !sums.gamma) return;
    float* const to_gamma[] = {sums.gamma + j};
    sum_rows(rows, to_gamma, sums.low, lanes,
             [&](int64_t i, Vec* terms) __attribute__((always_inline)) {
               const Vec g = row[i].template gradient<added>(args.weight, j, lanes);
               terms[0] = fma(g * broadcast(row[i].kept), load_lanes(row[i].x + j, lanes), terms[0]);
             });
  });
}

template <bool added, class X, class R>
void layer_norm_gradient_rows(const LayerNormGradientArgs& args, int64_t begin, int64_t end) {
  const bool narrow = !added && args.channels <= kNarrow;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* start = args.sums ? args.sums + chunk * 6 * args.channels : nullptr;
    for (int64_t i = 0; narrow && start && i < 6 * args.channels; ++i) start[i] = 0.0f;
    const RowSums sums{args.dweight ? start : nullptr,
                       args.dbias ? start + args.channels : nullptr,
                       args.dgamma ? start + 2 * args.channels : nullptr, 3 * args.channels};
    const int64_t from = chunk * kRowChunk, left = args.rows - from;
    const int64_t rows = left < kRowChunk ? left : kRowChunk;
    GradientRow<X, R> row[kRowChunk];
    for (int64_t i = 0; i < rows; ++i) {
      const GradientRow<X, R> one = measured_row<X, R>(args, from + i);
      if (!narrow) row[i] = one;
      if (narrow && start) add_row_terms(args, one, sums);
      write_row<added>(args, from + i, one);
    }
    if (!narrow && start) sum_chunk<added>(args, row, rows, sums);
  }
}

template <class X>
void layer_norm_gradient_of(const LayerNormGradientArgs& args, int64_t begin, int64_t end) {
  if (!args.dtotal.data) return layer_norm_gradient_rows<false, X, X>(args, begin, end);
  if (args.total_type == args.x_type) {
    return layer_norm_gradient_rows<true, X, X>(args, begin, end);
  }
  layer_norm_gradient_rows<true, X, float>(args, begin, end);
}

void layer_norm_gradient(const LayerNormGradientArgs& args, int64_t begin, int64_t end) {
  switch (args.x_type) {
    case Scalar::f32: return layer_norm_gradient_of<float>(args, begin, end);
    case Scalar::f16: return layer_norm_gradient_of<F16>(args, begin, end);
    case Scalar::bf16: return layer_norm_gradient_of<BF16>(args, begin, end);
  }
}

constexpr LayerNormKernels layer_norm_kernels = {layer_norm_workspace, layer_norm,
                                                 layer_norm_gradient};
