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
