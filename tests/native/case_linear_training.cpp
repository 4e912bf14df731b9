// The products of training: packed operands, and products with all that may follow or precede them.
#include "cases.h"
#include "linear.h"

namespace fuzz {
namespace {

// Redraws `rows` within `most` / 64: sums of products of products must stay small.
void shrink(Strided& rows, int64_t most, Random& random) {
  for (int64_t i = 0; i < rows.count * rows.width; ++i) {
    const float value = static_cast<float>(random.between(-most, most)) / 64.0f;
    rows.elements.set(rows.offset(i / rows.width) + i % rows.width, value);
  }
}

// A right operand: packed by every split alike, each element where the product looks for it.
class Operand {
 public:
  Operand(int64_t depth, int64_t width, const deit::TrainingProductKernels& set, Random& random)
      : transposed_(random.chance(0.5)),
        depth_(depth),
        b_({transposed_ ? width : depth}, transposed_ ? depth : width, f32, random),
        packed_((width + set.panel - 1) / set.panel * set.panel * depth, f32, random) {
    shrink(b_, 8, random);
    const deit::PackArgs args{b_.elements.memory.floats(), stride_of(b_), transposed_, depth,
                              width, packed_.memory.floats()};
    run((width + set.panel - 1) / set.panel, 0, {&packed_}, random,
        [&](float*, int64_t begin, int64_t end) { set.pack(args, begin, end); });
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t n = 0; n < width; ++n) {
        const int64_t panel = n / set.panel * set.panel;
        const int64_t index = panel * depth + k * set.panel + n - panel;
        near("panels", index, packed_.at(index), at(k, n), 0.0);
      }
    }
  }

  double at(int64_t k, int64_t n) { return transposed_ ? b_.at(n, k) : b_.at(k, n); }
  const float* panels() { return packed_.memory.floats(); }

  // [rows, width] in double.
  std::vector<double> times(const std::vector<double>& a, int64_t rows, int64_t width) {
    std::vector<double> y(static_cast<size_t>(rows * width));
    for (int64_t k = 0; k < depth_; ++k) {
      for (int64_t n = 0; n < width; ++n) {
        const double b = at(k, n);
        for (int64_t row = 0; row < rows; ++row) {
          y[static_cast<size_t>(row * width + n)] += a[static_cast<size_t>(row * depth_ + k)] * b;
        }
      }
    }
    return y;
  }

 private:
  bool transposed_;
  int64_t depth_;
  Strided b_;
  Elements packed_;
};

// One product: its operand, what its epilogue reads and writes, and that epilogue in double.
struct Product {
  Product(int64_t samples, int64_t each, int64_t depth, int64_t width, bool last, Random& random,
          const deit::TrainingProductKernels& set)
      : gradient(last && random.chance(0.3)),
        operand(depth, width, set, random),
        bias(width, gradient ? 0.0 : 0.7, random),
        gamma(width, gradient ? 0.0 : 0.4, random),
        keep(samples, gradient ? 0.0 : 0.4, random),
        residual(samples * each * width, !gradient && last ? 0.5 : 0.0, random),
        hidden(samples * each * width, gradient ? 1.0 : 0.0, random),
        out(last ? samples * each * width : 0, f32, random),
        affine(!gradient && random.chance(0.6) ? samples * each * width : 0, f32, random),
        activated_hidden(gradient && random.chance(0.7) ? samples * each * width : 0, f32, random) {
    args.panels = operand.panels();
    args.rows = samples * each, args.depth = depth, args.width = width;
    args.bias = bias.data, args.gamma = gamma.data, args.keep = keep.data;
    args.residual = residual.data, args.hidden = hidden.data;
    args.rows_per_sample = each;
    args.activation = any_activation(random, gradient ? Activation::gelu : Activation::none);
    if (last) args.out = out.memory.floats();
    if (affine.memory.bytes()) args.affine = affine.memory.floats();
    if (activated_hidden.memory.bytes()) args.activated = activated_hidden.memory.floats();
  }

  // The output of `a`, [rows, depth]; what was written on the way is checked.
  std::vector<double> check(const std::vector<double>& a) {
    std::vector<double> all = operand.times(a, args.rows, args.width);
    for (int64_t i = 0; i < args.rows * args.width; ++i) {
      const int64_t n = i % args.width, sample = i / args.width / args.rows_per_sample;
      double& y = all[static_cast<size_t>(i)];
      if (gradient) {
        const Activated gelu = activated(hidden.at(i, 0.0), args.activation);
        if (args.activated) near("activated", i, activated_hidden.at(i), gelu.value, f32);
        y *= gelu.slope;
        continue;
      }
      y += bias.at(n, 0.0);
      if (args.affine) near("affine", i, affine.at(i), y, f32);
      y = activated(y, args.activation).value * gamma.at(n, 1.0) * keep.at(sample, 1.0) +
          residual.at(i, 0.0);
    }
    return all;
  }

  deit::TrainingProductArgs args{};
  bool gradient;
  Operand operand;
  Parameter bias, gamma, keep, residual, hidden;
  Elements out, affine, activated_hidden;
};

}  // namespace

void fuzz_training_product(Random& random, const deit::Kernels& set) {
  const int64_t samples = random.between(1, 4), each = random.size(random.chance(0.2) ? 120 : 40);
  const int64_t rows = samples * each, depth = random.size(random.chance(0.1) ? 300 : 100);
  const bool two = random.chance(0.4);
  const int64_t width = random.size(150), between = random.size(150);
  Strided a({rows}, depth, f32, random);
  shrink(a, 64, random);
  Product first(samples, each, depth, two ? between : width, !two, random, set.training_product);
  Product second(samples, each, two ? between : 1, two ? width : 1, true, random, set.training_product);
  first.args.a = a.elements.memory.floats(), first.args.lda = stride_of(a);
  second.args.before = &first.args, second.args.lda = between;
  Product& last = two ? second : first;
  std::vector<Elements*> outputs{&last.out, &last.affine, &last.activated_hidden};
  if (two) outputs.push_back(&first.affine);
  run((rows + set.training_product.row_tile - 1) / set.training_product.row_tile,
      set.training_product.workspace(last.args), outputs, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.training_product.run(last.args, workspace, begin, end);
      });

  std::vector<double> y;
  for (int64_t i = 0; i < rows * depth; ++i) y.push_back(a.at(i / depth, i % depth));
  y = first.check(y);
  if (two) y = second.check(y);
  for (int64_t i = 0; i < rows * width; ++i) {
    near("out", i, last.out.at(i), y[static_cast<size_t>(i)], f32);
  }
}

}  // namespace fuzz
