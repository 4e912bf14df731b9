// Rows of any length by vectors. Included by kernels.cpp.

// f(i, lanes) over [0, n): whole vectors, then the rest. `lanes` is a constant in all but the last.
template <class F>
DEIT_INLINE void each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(i, kWidth);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class T>
DEIT_INLINE Vec load_lanes(const T* p, int lanes) {
  return lanes == kWidth ? load(p) : load_first(p, lanes);
}
template <class T>
DEIT_INLINE void store_lanes(T* p, Vec a, int lanes) {
  if (lanes == kWidth) {
    store(p, a);
  } else {
    store_first(p, a, lanes);
  }
}

// The columns of a row at `row` as words, `lanes` of them: of fp32 that row's, of bf16 those of the
// row below it in their upper halves, zeros where `rows` says that there is none.
DEIT_INLINE Vec load_words(const float* row, int64_t, int64_t, int lanes) {
  return load_lanes(row, lanes);
}
DEIT_INLINE Vec load_words(const BF16* row, int64_t stride, int64_t rows, int lanes) {
  if (lanes == kWidth && rows > 1) return load_pairs(row, row + stride);
  BF16 both[2][kWidth] = {};
  std::memcpy(both[0], row, static_cast<size_t>(lanes) * sizeof(BF16));
  if (rows > 1) std::memcpy(both[1], row + stride, static_cast<size_t>(lanes) * sizeof(BF16));
  return load_pairs(both[0], both[1]);
}

// high + low += a, with what rounding takes from `high` kept in `low` (Knuth's two-sum). A
// parameter's gradient is one sum over all rows, and where an outlier channel carries most of the
// gradient's norm, its rounding is that sum's alone: plain chains of 32 were off by 3.2 times
// PyTorch's error.
DEIT_INLINE void add_exactly(Vec& high, Vec& low, Vec a) {
  const Vec before = high;
  high = before + a;
  const Vec taken = high - before;
  low = low + ((before - (high - taken)) + (a - taken));
}
DEIT_INLINE void add_exactly(float* high, float* low, Vec a, int lanes) {
  Vec total = load_lanes(high, lanes), lost = load_lanes(low, lanes);
  add_exactly(total, lost, a);
  store_lanes(high, total, lanes);
  store_lanes(low, lost, lanes);
}
