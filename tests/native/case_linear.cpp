// What ops_linear.cpp launches: packed products with all that may follow or precede them, and the
// gradients of a linear layer's weight, bias and output.
#include "cases.h"
#include "fence.h"

namespace fuzz {
namespace {

using deit::Activation;
constexpr deit::Scalar f32 = deit::Scalar::f32;

struct Activated {
  double value, slope;
};

Activated activated(double x, Activation activation) {
  if (activation == Activation::none) return {x, 1.0};
  if (activation == Activation::gelu) {
    const double cdf = 0.5 * std::erfc(-x * std::sqrt(0.5));
    return {x * cdf, cdf + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI)};
  }
  const double root = std::sqrt(2.0 / M_PI), t = std::tanh(root * (x + 0.044715 * x * x * x));
  const double dz = root * (1.0 + 3.0 * 0.044715 * x * x);
  return {0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * dz};
}

Activation any_activation(Random& random) {
  return static_cast<Activation>(random.between(0, 2));
}

// The row stride of a Strided with one leading axis.
int64_t stride_of(const Strided& rows) { return rows.rows.strides[0]; }

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
  Operand(int64_t depth, int64_t width, const deit::TrainingKernels& set, Random& random)
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
          const deit::TrainingKernels& set)
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
    args.activation = gradient ? static_cast<Activation>(random.between(1, 2))
                               : any_activation(random);
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
  Product first(samples, each, depth, two ? between : width, !two, random, set.training);
  Product second(samples, each, two ? between : 1, two ? width : 1, true, random, set.training);
  first.args.a = a.elements.memory.floats(), first.args.lda = stride_of(a);
  second.args.before = &first.args, second.args.lda = between;
  Product& last = two ? second : first;
  std::vector<Elements*> outputs{&last.out, &last.affine, &last.activated_hidden};
  if (two) outputs.push_back(&first.affine);
  run((rows + set.training.row_tile - 1) / set.training.row_tile,
      set.training.product_workspace(last.args), outputs, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.training.product(last.args, workspace, begin, end);
      });

  std::vector<double> y;
  for (int64_t i = 0; i < rows * depth; ++i) y.push_back(a.at(i / depth, i % depth));
  y = first.check(y);
  if (two) y = second.check(y);
  for (int64_t i = 0; i < rows * width; ++i) {
    near("out", i, last.out.at(i), y[static_cast<size_t>(i)], f32);
  }
}

void fuzz_weight_gradient(Random& random, const deit::Kernels& set) {
  deit::WeightGradientArgs args{};
  const bool large = random.chance(0.1);
  args.rows = random.size(large ? 200 : 140);
  args.outputs = random.size(large ? 400 : 110);
  args.inputs = random.chance(0.15) ? 0 : random.size(large ? 400 : 110);  // 0: dbias alone
  const bool sums_bias = args.inputs == 0 || random.chance(0.7);
  Strided g({args.rows}, args.outputs, f32, random), x({args.rows}, args.inputs, f32, random);
  Elements dweight(args.outputs * args.inputs, f32, random);
  Elements dbias(sums_bias ? args.outputs : 0, f32, random);
  args.g = g.elements.memory.floats(), args.ldg = stride_of(g);
  args.x = x.elements.memory.floats(), args.ldx = stride_of(x);
  if (args.inputs > 0) args.dweight = dweight.memory.floats();
  if (sums_bias) args.dbias = dbias.memory.floats();
  const int64_t blocks[][2] = {{48, 64}, {192, 192}, {random.size(120), random.size(120)}};
  std::vector<uint8_t> bits[2];
  for (const auto& [output_block, input_block] : blocks) {  // any may be chosen, to the same bits
    args.output_block = output_block, args.input_block = input_block;
    const int64_t down = (args.outputs + output_block - 1) / output_block;
    run(down * std::max<int64_t>(1, (args.inputs + input_block - 1) / input_block),
        set.training.weight_gradient_workspace(args), {&dweight, &dbias}, random,
        [&](float* workspace, int64_t begin, int64_t end) {
          set.training.weight_gradient(args, workspace, begin, end);
        });
    if (bits[0].empty()) bits[0] = dweight.memory.copy(), bits[1] = dbias.memory.copy();
    if (dweight.memory.copy() != bits[0] || dbias.memory.copy() != bits[1]) {
      fail("the sums depend on the blocks of the weight");
    }
  }

  std::vector<double> weight(static_cast<size_t>(args.outputs * args.inputs));
  std::vector<double> bias(static_cast<size_t>(args.outputs));
  for (int64_t row = 0; row < args.rows; ++row) {
    std::vector<double> of_row;
    for (int64_t i = 0; i < args.inputs; ++i) of_row.push_back(x.at(row, i));
    for (int64_t o = 0; o < args.outputs; ++o) {
      const double factor = g.at(row, o);
      double* to = weight.data() + o * args.inputs;
      for (size_t i = 0; i < of_row.size(); ++i) to[i] += factor * of_row[i];
      bias[static_cast<size_t>(o)] += factor;
    }
  }
  for (size_t i = 0; i < weight.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i);
    near("dweight", index, dweight.at(index), weight[i], f32);
  }
  for (size_t i = 0; sums_bias && i < bias.size(); ++i) {
    near("dbias", static_cast<int64_t>(i), dbias.at(static_cast<int64_t>(i)), bias[i], f32);
  }
}

void fuzz_output_gradient(Random& random, const deit::Kernels& set) {
  deit::OutputGradientArgs args{};
  const int64_t samples = random.between(1, 4), each = random.size(80);
  args.rows = samples * each, args.channels = random.size(140), args.rows_per_sample = each;
  args.activation = any_activation(random);
  Strided dout({args.rows}, args.channels, f32, random);
  Parameter gamma(args.channels, 0.5, random), keep(samples, 0.5, random);
  const bool wants_g = random.chance(0.8), wants_gamma = gamma.data && random.chance(0.7);
  const bool reads_affine = args.activation != Activation::none || wants_gamma;
  Parameter affine(args.rows * args.channels, reads_affine ? 1.0 : 0.0, random);
  const int64_t chunks = (args.rows + deit::kRowChunk - 1) / deit::kRowChunk;
  Elements g(wants_g ? args.rows * args.channels : 0, f32, random);
  Elements sums(wants_gamma ? chunks * 2 * args.channels : 0, f32, random);
  args.dout = dout.elements.memory.floats(), args.ldd = stride_of(dout);
  args.affine = affine.data, args.gamma = gamma.data, args.keep = keep.data;
  if (wants_g) args.g = g.memory.floats();
  if (wants_gamma) args.dgamma = sums.memory.floats();
  run(chunks, 0, {&g, &sums}, random, [&](float*, int64_t begin, int64_t end) {
    set.training.output_gradient(args, begin, end);
  });

  std::vector<double> dgamma(static_cast<size_t>(chunks * args.channels));
  for (int64_t i = 0; i < args.rows * args.channels; ++i) {
    const int64_t row = i / args.channels, n = i % args.channels;
    const double dy = dout.at(row, n) * keep.at(row / each, 1.0);
    const Activated y = activated(affine.at(i, 0.0), args.activation);
    if (wants_g) near("g", i, g.at(i), dy * gamma.at(n, 1.0) * y.slope, f32);
    dgamma[static_cast<size_t>(row / deit::kRowChunk * args.channels + n)] += dy * y.value;
  }
  for (int64_t i = 0; wants_gamma && i < chunks * args.channels; ++i) {
    const int64_t high = i + i / args.channels * args.channels;
    near("dgamma", i, sums.at(high) + sums.at(high + args.channels),
         dgamma[static_cast<size_t>(i)], f32);
  }
}

}  // namespace fuzz
