// The products of training: packed operands, and products with all that may follow or precede them.
#include "cases.h"
#include "linear.h"

namespace fuzz {
namespace {

// [rows, columns] within `most` / 64, so that sums of products of products stay small, at a row
// stride of whole words where its columns are: some rows overlap, some leave gaps.
struct Matrix {
  Matrix(int64_t rows, int64_t columns, deit::Scalar type, int64_t most, Random& random)
      : stride(random.chance(0.1) ? 0 : columns + (random.chance(0.5) ? 2 * random.size(5) : 0)),
        elements((rows - 1) * stride + columns, type, random) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; ++i) {
        elements.set(row * stride + i, static_cast<float>(random.between(-most, most)) / 64.0f);
      }
    }
  }
  double at(int64_t row, int64_t i) { return elements.at(row * stride + i); }

  int64_t stride;
  Elements elements;
};

int64_t in_word(deit::Scalar type) { return type == f32 ? 1 : 2; }
int64_t words_of(int64_t n, deit::Scalar type) { return (n + in_word(type) - 1) / in_word(type); }
// A size that is whole words.
int64_t whole(int64_t n, deit::Scalar type) { return words_of(n, type) * in_word(type); }

// A right operand: packed by every split alike, each element where the product looks for it, zeros
// in what the last word lacks.
class Operand {
 public:
  Operand(int64_t depth, int64_t width, deit::Scalar type, const deit::TrainingProductKernels& set,
          Random& random)
      : transposed_(depth % in_word(type) == 0 && random.chance(0.5)),
        depth_(depth),
        b_(transposed_ ? width : depth, transposed_ ? depth : width, type, 8, random),
        packed_((width + set.panel - 1) / set.panel * set.panel * whole(depth, type), type, random) {
    const deit::PackArgs args{b_.elements.memory.data(), b_.stride, transposed_, depth,
                              width, packed_.memory.floats(), type};
    run((width + set.panel - 1) / set.panel, 0, {&packed_}, random,
        [&](float*, int64_t begin, int64_t end) { set.pack(args, begin, end); });
    for (int64_t k = 0; k < whole(depth, type); ++k) {
      for (int64_t n = 0; n < width; ++n) {
        const int64_t panel = n / set.panel * set.panel, row = k / in_word(type);
        const int64_t word = panel * words_of(depth, type) + row * set.panel + n - panel;
        const int64_t index = word * in_word(type) + k % in_word(type);
        near("panels", index, packed_.at(index), k < depth ? at(k, n) : 0.0, 0.0);
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
  Matrix b_;
  Elements packed_;
};

// Elements of what an epilogue reads, or none.
struct Read {
  Read(int64_t count, double present, deit::Scalar type, Random& random)
      : elements(random.chance(present) ? count : 0, type, random),
        data(elements.memory.bytes() ? elements.memory.data() : nullptr) {
    for (int64_t i = 0; data && i < count; ++i) elements.randomise(i, random);
  }
  double at(int64_t i) { return data ? elements.at(i) : 0.0; }

  Elements elements;
  void* data;
};

// One product: its operand, what its epilogue reads and writes, and that epilogue in double.
struct Product {
  Product(int64_t samples, int64_t each, int64_t depth, int64_t width, bool last,
          deit::Scalar type, deit::Scalar out_type, Random& random,
          const deit::TrainingProductKernels& set)
      : gradient(last && random.chance(0.3)),
        type(type),
        out_type(gradient || !last ? type : out_type),
        operand(depth, width, type, set, random),
        bias(width, gradient ? 0.0 : 0.7, random),
        gamma(width, gradient ? 0.0 : 0.4, random),
        keep(samples, gradient ? 0.0 : 0.4, random),
        residual(samples * each * width, !gradient && last ? 0.5 : 0.0, this->out_type, random),
        hidden(samples * each * width, gradient ? 1.0 : 0.0, type, random),
        out(last ? samples * each * width : 0, this->out_type, random),
        affine(!gradient && random.chance(0.6) ? samples * each * width : 0, type, random),
        activated_hidden(gradient && random.chance(0.7) ? samples * each * width : 0, type, random) {
    args.panels = operand.panels();
    args.rows = samples * each, args.depth = words_of(depth, type), args.width = width;
    args.bias = bias.data, args.gamma = gamma.data, args.keep = keep.data;
    args.residual = residual.data, args.hidden = hidden.data;
    args.rows_per_sample = each;
    args.type = type, args.out_type = this->out_type;
    args.activation = any_activation(random, gradient ? Activation::gelu : Activation::none);
    if (last) args.out = out.memory.data();
    if (affine.memory.bytes()) args.affine = affine.memory.data();
    if (activated_hidden.memory.bytes()) args.activated = activated_hidden.memory.data();
  }

  // The output of `a`, [rows, depth]; what was written on the way is checked.
  std::vector<double> check(const std::vector<double>& a) {
    std::vector<double> all = operand.times(a, args.rows, args.width);
    for (int64_t i = 0; i < args.rows * args.width; ++i) {
      const int64_t n = i % args.width, sample = i / args.width / args.rows_per_sample;
      double& y = all[static_cast<size_t>(i)];
      if (gradient) {
        const Activated gelu = activated(hidden.at(i), args.activation);
        if (args.activated) near("activated", i, activated_hidden.at(i), gelu.value, type);
        y *= gelu.slope;
        continue;
      }
      y += bias.at(n, 0.0);
      if (args.affine) near("affine", i, affine.at(i), y, rounding());
      y = activated(y, args.activation).value * gamma.at(n, 1.0) * keep.at(sample, 1.0) +
          residual.at(i);
    }
    return all;
  }

  // Behind another product of bf16 its rounded output's errors are summed, then times gamma and
  // keep of 4 at most.
  double rounding() const { return type == f32 ? 2e-4 : args.before ? 0.25 : 1.6e-2; }

  deit::TrainingProductArgs args{};
  bool gradient;
  deit::Scalar type, out_type;
  Operand operand;
  Parameter bias, gamma, keep;
  Read residual, hidden;
  Elements out, affine, activated_hidden;
};

}  // namespace

void fuzz_training_product(Random& random, const deit::Kernels& set) {
  const deit::Scalar type = any_operand(random), out_type = random.chance(0.5) ? type : f32;
  const int64_t samples = random.between(1, 4), each = random.size(random.chance(0.2) ? 120 : 40);
  const int64_t rows = samples * each, depth = random.size(random.chance(0.1) ? 300 : 100);
  const bool two = random.chance(0.4);
  const int64_t width = random.size(150), between = whole(random.size(150), type);
  Matrix a(rows, whole(depth, type), type, 64, random);
  for (int64_t row = 0; row < rows && depth % in_word(type); ++row) {
    a.elements.set(row * a.stride + depth, 0.0f);  // a column more, as the launcher makes it
  }
  Product first(samples, each, depth, two ? between : width, !two, type, out_type, random,
                set.training_product);
  Product second(samples, each, two ? between : 1, two ? width : 1, true, type, out_type, random,
                 set.training_product);
  first.args.a = a.elements.memory.floats(), first.args.lda = a.stride / in_word(type);
  second.args.before = &first.args, second.args.lda = words_of(between, type);
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
    near("out", i, last.out.at(i), y[static_cast<size_t>(i)], last.rounding());
  }
}

}  // namespace fuzz
