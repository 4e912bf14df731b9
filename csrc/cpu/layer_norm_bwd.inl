// The gradient of LayerNorm, alone or with the residual addition before it, and of RMSNorm.
// Included by kernels.cpp.
//
//     xhat = (total - mean) rstd      wdy = weight dout
//     dtotal += rstd (wdy - mean(wdy) - xhat mean(wdy xhat))      dx = keep gamma dtotal
//
// RMSNorm's has neither mean, that of total or that of wdy, in it. A row stays in L1 between its
// passes. What rounding left of the mean is measured again and taken off, as in the forward: at mean
// 1000 and deviation 1 it would put 3e-5 on every xhat.

struct RowSums {
  float *weight, *bias, *gamma;  // [D] or null, and what rounding took from each at `low` past it
  int64_t low;
};

template <class X, class R>
DEIT_INLINE void gradient_of_row(const LayerNormGradientArgs& args, int64_t row, const X* dout,
                                 const R* total, const RowSums& sums) {
  const int64_t channels = args.channels;
  const bool rms = args.mean == nullptr;
  const Vec mean = broadcast(rms ? 0.0f : args.mean[row]), rstd = broadcast(args.rstd[row]);
  Vec deviation = broadcast(0.0f);
  each_vector(rms ? 0 : channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const Vec d = load_lanes(total + j, lanes) - mean;
    deviation = deviation + (lanes == kWidth ? d : first(d, lanes));
  });
  const float count = static_cast<float>(channels);
  const Vec rest = broadcast(sum(deviation) / count) * rstd;
  Vec plain[2] = {}, along[2] = {};
  each_vector(channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const int chain = static_cast<int>(j / kWidth % 2);
    const Vec xhat = fma(load_lanes(total + j, lanes) - mean, rstd, broadcast(0.0f) - rest);
    const Vec dy = load_lanes(dout + j, lanes), wdy = dy * load_lanes(args.weight + j, lanes);
    plain[chain] = plain[chain] + wdy;
    along[chain] = fma(wdy, xhat, along[chain]);
    if (sums.weight) {
      add_exactly(sums.weight + j, sums.weight + sums.low + j, dy * xhat, lanes);
    }
    if (sums.bias) add_exactly(sums.bias + j, sums.bias + sums.low + j, dy, lanes);
  });
  if (!args.dresidual && !args.dx && !sums.gamma) return;
  const Vec mean_plain = broadcast(rms ? 0.0f : sum(plain[0] + plain[1]) / count);
  const Vec mean_along = broadcast(sum(along[0] + along[1]) / count);
  R* out = args.dresidual ? static_cast<R*>(args.dresidual) + row * channels : nullptr;
  const R* dtotal = static_cast<const R*>(args.dtotal.data);
  if (dtotal) dtotal += row_offset(args.dtotal, row);
  const X* x = sums.gamma ? static_cast<const X*>(args.x.data) + row_offset(args.x, row) : nullptr;
  X* dx = args.dx ? static_cast<X*>(args.dx) + row * channels : nullptr;
  const Vec kept = broadcast(args.keep ? args.keep[row / args.rows_per_sample] : 1.0f);
  each_vector(channels, [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const Vec xhat = fma(load_lanes(total + j, lanes) - mean, rstd, broadcast(0.0f) - rest);
    const Vec wdy = load_lanes(dout + j, lanes) * load_lanes(args.weight + j, lanes);
    Vec g = rstd * ((wdy - mean_plain) - xhat * mean_along);
    if (dtotal) g = load_lanes(dtotal + j, lanes) + g;
    if (out) store_lanes(out + j, g, lanes);
    g = g * kept;
    if (x) {
      add_exactly(sums.gamma + j, sums.gamma + sums.low + j, g * load_lanes(x + j, lanes), lanes);
    }
    if (!dx) return;
    if (args.gamma) g = g * load_lanes(args.gamma + j, lanes);
    store_lanes(dx + j, g, lanes);
  });
}

template <class X, class R>
void layer_norm_gradient_typed(const LayerNormGradientArgs& args, int64_t begin, int64_t end) {
  const X* dout = static_cast<const X*>(args.dout.data);
  const R* total = static_cast<const R*>(args.total.data);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* start = args.sums ? args.sums + chunk * 6 * args.channels : nullptr;
    for (int64_t i = 0; start && i < 6 * args.channels; ++i) start[i] = 0.0f;
    const RowSums sums{args.dweight ? start : nullptr,
                       args.dbias ? start + args.channels : nullptr,
                       args.dgamma ? start + 2 * args.channels : nullptr, 3 * args.channels};
    const int64_t first_row = chunk * kRowChunk, left = args.rows - first_row;
    for (int64_t row = first_row; row < first_row + (left < kRowChunk ? left : kRowChunk); ++row) {
      gradient_of_row(args, row, dout + row_offset(args.dout, row),
                      total + row_offset(args.total, row), sums);
    }
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
