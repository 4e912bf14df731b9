// Both products of an MLP on the rows of one image, for vit_block.inl: they share a step of the
// hidden layer in the cache. Included by kernels.cpp.

namespace products {

DEIT_INLINE int64_t sums_of_panel(int64_t rows) { return tiles_of(rows) * kRows * kCols; }

// Floats of `sums` for feed_forward: of all panels of `second`, and of one of `first`.
DEIT_INLINE int64_t feed_forward_sums(const ProductArgs& second) {
  return ((second.width + kCols - 1) / kCols + 1) * sums_of_panel(second.rows);
}

// second(first(x)), both packed, a step of `second` at a time. The columns of `first` that make the
// step go into `hidden` [rows, kDepth words]. Then all panels of `second` take that step, and their
// sums wait in `sums`. second.residual and second.out may be the same.
template <class T>
void feed_forward(const ProductArgs& first, const ProductArgs& second, float* hidden,
                  float* sums) {
  constexpr int64_t kElements = static_cast<int64_t>(sizeof(float) / sizeof(T));  // of a word
  const int64_t rows = first.rows, tiles = tiles_of(rows), padded = sums_of_panel(rows);
  const int64_t panels = (second.width + kCols - 1) / kCols, words = step_of(second.depth);
  for (int64_t k = 0; k < second.depth; k += words) {
    ProductArgs part = first, step = second;
    step.depth = smaller(words, second.depth - k);
    part.width = step.depth * kElements;
    part.packed += k * kElements * first.depth;
    if (part.bias) part.bias += k * kElements;
    part.row_block = rows;
    part.out = hidden;
    step.x = hidden;
    for (int64_t column = 0; column < part.width; column += kCols) {
      multiply_panel<T>(part, sums + panels * padded, 0, column, true);
    }
    Tile tile{};
    tile.depth = step.depth;
    tile.first = k == 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      tile.column = panel * kCols;
      tile.columns = smaller(kCols, step.width - tile.column);
      const float* weights = second.packed + (panel * second.depth + k) * kCols;
      const int64_t next = panel + 1 < panels ? step.depth : 0;
      multiply_step<T>(step, weights, tile, 0, rows, k + step.depth == second.depth,
                       prefetch_packed(weights + second.depth * kCols, next, tiles),
                       sums + panel * padded);
    }
  }
}

}  // namespace products
