// The gradients of a linear layer's weight and bias, and of what comes before its epilogue.
#include "cases.h"
#include "fence.h"
#include "linear.h"

namespace fuzz {
namespace {

// A weight's inputs: a matrix, or the patches of images, whose channels come before pixels or after.
struct Inputs {
  Inputs(deit::WeightGradientArgs& args, bool large, Random& random) {
    const bool patches = random.chance(0.4);
    args.samples = patches || random.chance(0.2) ? random.between(1, 3) : 1;
    args.rows = random.size((large ? 200 : 140) / args.samples);
    args.inputs = random.size(large ? 400 : 110);
    if (!patches) {
      if (args.samples > 1 || random.chance(0.15)) args.inputs = 0;  // dbias alone
      const std::vector<int64_t> sizes = {args.rows};
      matrix = std::make_unique<Strided>(sizes, args.inputs, args.type, random);
      args.x = matrix->elements.memory.data(), args.ldx = stride_of(*matrix);
      return;
    }
    in.width = random.chance(0.5) ? 16 : random.size(20), in.height = random.size(5);
    in.channels = random.between(1, 3), in.across = random.size(large ? 14 : 7);
    args.rows = in.patches = in.across * random.size(large ? 14 : 7);
    args.inputs = in.channels * in.height * in.width;
    const int64_t down = in.patches / in.across * in.height, right = in.across * in.width;
    const bool last = random.chance(0.3);
    const int64_t c = in.channels;
    const std::vector<int64_t> sizes = {args.samples, last ? down : c, last ? right : down};
    matrix = std::make_unique<Strided>(sizes, last ? c : right, args.type, random);
    const int64_t* strides = matrix->rows.strides;
    const int64_t before[] = {strides[0], strides[1], strides[2], 1};
    const int64_t after[] = {strides[0], 1, strides[1], strides[2]};
    std::copy_n(last ? after : before, 4, in.strides);
    in.data = matrix->elements.memory.data();
    args.images = &in;
  }

  double at(int64_t sample, int64_t row, int64_t i) {
    if (!in.data) return matrix->at(row, i);
    const int64_t x = row % in.across * in.width + i % in.width, line = i / in.width;
    const int64_t y = row / in.across * in.height + line % in.height, c = line / in.height;
    return matrix->elements.at(sample * in.strides[0] + c * in.strides[1] + y * in.strides[2] +
                               x * in.strides[3]);
  }

  deit::Images in{};
  std::unique_ptr<Strided> matrix;
};

}  // namespace

void fuzz_weight_gradient(Random& random, const deit::Kernels& set) {
  deit::WeightGradientArgs args{};
  const bool large = random.chance(0.1);
  const deit::Scalar type = args.type = any_operand(random);
  args.outputs = random.size(large ? 400 : 110);
  Inputs x(args, large, random);
  const bool sums_bias = args.inputs == 0 || random.chance(0.7);
  Strided g({args.samples, args.rows}, args.outputs, type, random);
  Elements dweight(args.outputs * args.inputs, type, random);
  Elements dbias(sums_bias ? args.outputs : 0, type, random);
  args.g = g.elements.memory.data();
  args.sample_ldg = g.rows.strides[0], args.ldg = g.rows.strides[1];
  if (args.inputs > 0) args.dweight = dweight.memory.data();
  if (sums_bias) args.dbias = dbias.memory.data();
  const int64_t blocks[][2] = {{48, 64}, {192, 192}, {random.size(120), random.size(120)}};
  std::vector<uint8_t> bits[2];
  for (const auto& [output_block, input_block] : blocks) {  // any may be chosen, to the same bits
    args.output_block = output_block, args.input_block = input_block;
    const int64_t down = (args.outputs + output_block - 1) / output_block;
    run(down * std::max<int64_t>(1, (args.inputs + input_block - 1) / input_block),
        set.linear_gradient.weight_workspace(args), {&dweight, &dbias}, random,
        [&](float* workspace, int64_t begin, int64_t end) {
          set.linear_gradient.weight(args, workspace, begin, end);
        });
    if (bits[0].empty()) bits[0] = dweight.memory.copy(), bits[1] = dbias.memory.copy();
    if (dweight.memory.copy() != bits[0] || dbias.memory.copy() != bits[1]) {
      fail("the sums depend on the blocks of the weight");
    }
  }

  std::vector<double> weight(static_cast<size_t>(args.outputs * args.inputs));
  std::vector<double> bias(static_cast<size_t>(args.outputs));
  for (int64_t row = 0; row < args.samples * args.rows; ++row) {
    std::vector<double> of_row;
    for (int64_t i = 0; i < args.inputs; ++i) {
      of_row.push_back(x.at(row / args.rows, row % args.rows, i));
    }
    for (int64_t o = 0; o < args.outputs; ++o) {
      const double factor = g.at(row, o);
      double* to = weight.data() + o * args.inputs;
      for (size_t i = 0; i < of_row.size(); ++i) to[i] += factor * of_row[i];
      bias[static_cast<size_t>(o)] += factor;
    }
  }
  for (size_t i = 0; i < weight.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i);
    near("dweight", index, dweight.at(index), weight[i], type);
  }
  for (size_t i = 0; sums_bias && i < bias.size(); ++i) {
    near("dbias", static_cast<int64_t>(i), dbias.at(static_cast<int64_t>(i)), bias[i], type);
  }
}

void fuzz_output_gradient(Random& random, const deit::Kernels& set) {
  deit::OutputGradientArgs args{};
  const int64_t samples = random.between(1, 4), each = random.size(80);
  args.rows = samples * each, args.channels = random.size(140), args.rows_per_sample = each;
  args.activation = any_activation(random);
  const deit::Scalar type = args.type = any_operand(random);
  args.dout_type = random.chance(0.5) ? type : f32;
  Strided dout({args.rows}, args.channels, args.dout_type, random);
  Parameter gamma(args.channels, 0.5, random), keep(samples, 0.5, random);
  const bool wants_g = random.chance(0.8), wants_gamma = gamma.data && random.chance(0.7);
  const bool reads_affine = args.activation != Activation::none || wants_gamma;
  Elements affine(reads_affine ? args.rows * args.channels : 0, type, random);
  for (int64_t i = 0; reads_affine && i < args.rows * args.channels; ++i) affine.randomise(i, random);
  const int64_t chunks = (args.rows + deit::kRowChunk - 1) / deit::kRowChunk;
  Elements g(wants_g ? args.rows * args.channels : 0, type, random);
  Elements sums(wants_gamma ? chunks * 2 * args.channels : 0, f32, random);
  args.dout = dout.elements.memory.data(), args.ldd = stride_of(dout);
  args.gamma = gamma.data, args.keep = keep.data;
  if (reads_affine) args.affine = affine.memory.data();
  if (wants_g) args.g = g.memory.data();
  if (wants_gamma) args.dgamma = sums.memory.floats();
  run(chunks, 0, {&g, &sums}, random, [&](float*, int64_t begin, int64_t end) {
    set.linear_gradient.output(args, begin, end);
  });

  std::vector<double> dgamma(static_cast<size_t>(chunks * args.channels));
  for (int64_t i = 0; i < args.rows * args.channels; ++i) {
    const int64_t row = i / args.channels, n = i % args.channels;
    const double dy = dout.at(row, n) * keep.at(row / each, 1.0);
    const Activated y = activated(reads_affine ? affine.at(i) : 0.0, args.activation);
    if (wants_g) near("g", i, g.at(i), dy * gamma.at(n, 1.0) * y.slope, type);
    dgamma[static_cast<size_t>(row / deit::kRowChunk * args.channels + n)] += dy * y.value;
  }
  for (int64_t i = 0; wants_gamma && i < chunks * args.channels; ++i) {
    const int64_t high = i + i / args.channels * args.channels;
    near("dgamma", i, sums.at(high) + sums.at(high + args.channels),
         dgamma[static_cast<size_t>(i)], f32);
  }
}

}  // namespace fuzz
