// The gradient of LayerNorm, alone or with the residual addition before it. Included by
// kernels.cpp.
//
//     xhat = (total - mean) rstd      wdy = weight dout
//     dtotal += rstd (wdy - mean(wdy) - xhat mean(wdy xhat))      dx = keep gamma dtotal
//
// A row stays in L1 between its passes. What rounding left of the mean is measured again and taken
// off, as in the forward: at mean 1000 and deviation 1 it would put 3e-5 on every xhat.

struct RowSums {
  float *weight, *bias, *gamma;  // [D] or null, and what rounding took from each at `low` past it
  int64_t low;
};

// Rows whose terms of a parameter's gradient are added up before they join the sums: those are two
// loads, two stores and six additions an element, more than all else that a row does.
constexpr int kRowsAtOnce = 4;

// The sum of each row's `term`, as a tree.
template <int N>
DEIT_INLINE Vec total_of(const Vec (&term)[N]) {
  if constexpr (N == 1) return term[0];
  if constexpr (N == 4) return (term[0] + term[1]) + (term[2] + term[3]);
}

// What the sums over a row need of it, and the row's pieces.
template <class X, class R>
struct GradientRow {
  const X* dout;
  const R* total;
  Vec mean, rstd, rest, plain, along;
  DEIT_INLINE Vec xhat(int64_t j, int lanes) const {
    return fma(load_lanes(total + j, lanes) - mean, rstd, broadcast(0.0f) - rest);
  }
};

template <class X, class R>
DEIT_INLINE GradientRow<X, R> gradient_row(const LayerNormGradientArgs& args, int64_t row) {
  GradientRow<X, R> r;
  r.dout = static_cast<const X*>(args.dout.data) + row_offset(args.dout, row);
  r.total = static_cast<const R*>(args.total.data) + row_offset(args.total, row);
  r.mean = broadcast(args.mean[row]), r.rstd = broadcast(args.rstd[row]);
  Vec deviation[2] = {};
  each_vector(args.channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    Vec& chain = deviation[j / kWidth % 2];
    const Vec d = load_lanes(r.total + j, lanes) - r.mean;
    chain = chain + (lanes == kWidth ? d : first(d, lanes));
  });
  const float count = static_cast<float>(args.channels);
  r.rest = broadcast(sum(deviation[0] + deviation[1]) / count) * r.rstd;
  r.plain = r.along = broadcast(0.0f);
  return r;
}

// N rows' gradients of what LayerNorm read, and their terms of gamma's.
template <int N, class X, class R>
DEIT_INLINE void input_gradients(const LayerNormGradientArgs& args, int64_t row,
                                 const GradientRow<X, R> (&rows)[N], const RowSums& sums) {
  const int64_t channels = args.channels;
  const float count = static_cast<float>(channels);
  Vec mean_plain[N], mean_along[N], kept[N];
  const R* dtotal[N];
  const X* x[N];
  for (int i = 0; i < N; ++i) {
    mean_plain[i] = broadcast(sum(rows[i].plain) / count);
    mean_along[i] = broadcast(sum(rows[i].along) / count);
    const R* more = static_cast<const R*>(args.dtotal.data);
    dtotal[i] = more ? more + row_offset(args.dtotal, row + i) : nullptr;
    x[i] = sums.gamma ? static_cast<const X*>(args.x.data) + row_offset(args.x, row + i) : nullptr;
    kept[i] = broadcast(args.keep ? args.keep[(row + i) / args.rows_per_sample] : 1.0f);
  }
  R* out = args.dresidual ? static_cast<R*>(args.dresidual) + row * channels : nullptr;
  X* dx = args.dx ? static_cast<X*>(args.dx) + row * channels : nullptr;
  each_vector(channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const Vec weight = load_lanes(args.weight + j, lanes);
    Vec scaled[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Vec wdy = load_lanes(rows[i].dout + j, lanes) * weight;
      Vec g = rows[i].rstd * ((wdy - mean_plain[i]) - rows[i].xhat(j, lanes) * mean_along[i]);
      if (dtotal[i]) g = load_lanes(dtotal[i] + j, lanes) + g;
      if (out) store_lanes(out + i * channels + j, g, lanes);
      g = g * kept[i];
      if (sums.gamma) scaled[i] = g * load_lanes(x[i] + j, lanes);
      if (!dx) continue;
      if (args.gamma) g = g * load_lanes(args.gamma + j, lanes);
      store_lanes(dx + i * channels + j, g, lanes);
    }
    if (sums.gamma) {
      add_exactly(sums.gamma + j, sums.gamma + sums.low + j, total_of(scaled), lanes);
    }
  });
}

template <int N, class X, class R>
void gradient_of_rows(const LayerNormGradientArgs& args, int64_t row, const RowSums& sums) {
  GradientRow<X, R> rows[N];
  for (int i = 0; i < N; ++i) rows[i] = gradient_row<X, R>(args, row + i);
  each_vector(args.channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const Vec weight = load_lanes(args.weight + j, lanes);
    Vec dy[N], scaled[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Vec xhat = rows[i].xhat(j, lanes);
      dy[i] = load_lanes(rows[i].dout + j, lanes);
      const Vec wdy = dy[i] * weight;
      rows[i].plain = rows[i].plain + wdy;
      rows[i].along = fma(wdy, xhat, rows[i].along);
      scaled[i] = dy[i] * xhat;
    }
    if (sums.weight) {
      add_exactly(sums.weight + j, sums.weight + sums.low + j, total_of(scaled), lanes);
    }
    if (sums.bias) add_exactly(sums.bias + j, sums.bias + sums.low + j, total_of(dy), lanes);
  });
  if (args.dresidual || args.dx || sums.gamma) input_gradients(args, row, rows, sums);
}

template <class X, class R>
void layer_norm_gradient_typed(const LayerNormGradientArgs& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* start = args.sums ? args.sums + chunk * 6 * args.channels : nullptr;
    for (int64_t i = 0; start && i < 6 * args.channels; ++i) start[i] = 0.0f;
    const RowSums sums{args.dweight ? start : nullptr,
                       args.dbias ? start + args.channels : nullptr,
                       args.dgamma ? start + 2 * args.channels : nullptr, 3 * args.channels};
    int64_t row = chunk * kRowChunk;
    const int64_t last = row + kRowChunk < args.rows ? row + kRowChunk : args.rows;
    for (; row + kRowsAtOnce <= last; row += kRowsAtOnce) {
      gradient_of_rows<kRowsAtOnce, X, R>(args, row, sums);
    }
    for (; row < last; ++row) gradient_of_rows<1, X, R>(args, row, sums);
  }
}

template <class X>
void layer_norm_gradient_of(const LayerNormGradientArgs& args, int64_t begin, int64_t end) {
  if (args.total_type == args.x_type) return layer_norm_gradient_typed<X, X>(args, begin, end);
  layer_norm_gradient_typed<X, float>(args, begin, end);
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
