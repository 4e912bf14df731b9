// layer_norm and add_layer_norm: any leading axes, strides and mixture of dtypes.
#include "cases.h"
#include "fence.h"

namespace fuzz {

void fuzz_layer_norm(Random& random, const deit::Kernels& set) {
  std::vector<int64_t> sizes;
  for (int64_t d = random.between(0, deit::kMaxLeadingDims); d > 0; --d) {
    sizes.push_back(random.between(1, 4));
  }
  const int64_t width = random.chance(0.05) ? random.size(2100) : random.size(140);
  const bool add = random.chance(0.6);
  deit::LayerNormArgs args{};
  args.rms = random.chance(0.3);
  args.x_type = random.type();
  args.residual_type = random.chance(0.5) ? args.x_type : deit::Scalar::f32;
  Strided x(sizes, width, args.x_type, random);
  Strided residual(sizes, width, args.residual_type, random);
  Parameter weight(width, 1.0, random), bias(width, 0.7, random);
  const int64_t samples = sizes.empty() ? 1 : sizes[0];
  Parameter gamma(width, add ? 0.5 : 0.0, random), keep(samples, add ? 0.5 : 0.0, random);
  Elements out(x.count * width, args.x_type, random);
  Elements sum(add ? x.count * width : 0, args.residual_type, random);
  args.x = x.rows;
  if (add) args.residual = residual.rows;
  args.weight = weight.data, args.bias = bias.data, args.gamma = gamma.data, args.keep = keep.data;
  args.out = out.memory.data();
  if (add) args.sum = sum.memory.data();
  args.channels = width;
  args.rows_per_sample = x.count / samples;
  args.eps = 1e-5f;
  run(x.count, set.layer_norm.workspace(args), {&out, &sum}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.layer_norm.forward(args, workspace, begin, end);
      });

  std::vector<double> total(static_cast<size_t>(width));
  for (int64_t row = 0; row < x.count; ++row) {
    double mean = 0.0, variance = 0.0;
    for (int64_t i = 0; i < width; ++i) {
      double& y = total[static_cast<size_t>(i)] = x.at(row, i);
      if (add) {
        y = y * gamma.at(i, 1.0) * keep.at(row / args.rows_per_sample, 1.0) + residual.at(row, i);
        near("sum", row * width + i, sum.at(row * width + i), y, sum.type);
      }
      if (!args.rms) mean += y / static_cast<double>(width);
    }
    for (const double y : total) variance += (y - mean) * (y - mean) / static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) {
      const double y = (total[static_cast<size_t>(i)] - mean) / std::sqrt(variance + 1e-5);
      near("out", row * width + i, out.at(row * width + i),
           y * weight.at(i, 1.0) + bias.at(i, 0.0), out.type);
    }
  }
}

void fuzz_layer_norm_gradient(Random& random, const deit::Kernels& set) {
  std::vector<int64_t> sizes;
  for (int64_t d = random.between(0, deit::kMaxLeadingDims); d > 0; --d) {
    sizes.push_back(random.between(1, 4));
  }
  if (sizes.size() == 2) sizes[1] = random.size(70);  // several chunks of rows
  const int64_t width = random.chance(0.05) ? random.size(2100) : random.size(140);
  const bool add = random.chance(0.6);
  deit::LayerNormGradientArgs args{};
  args.x_type = random.type();
  args.total_type = add && random.chance(0.5) ? deit::Scalar::f32 : args.x_type;
  Strided dout(sizes, width, args.x_type, random), x(sizes, width, args.x_type, random);
  Strided total(sizes, width, args.total_type, random);
  Strided dtotal(sizes, width, args.total_type, random);
  const int64_t rows = total.count, samples = sizes.empty() ? 1 : sizes[0];
  const int64_t chunks = (rows + deit::kRowChunk - 1) / deit::kRowChunk;
  // Any statistics will do: the kernel takes the mean's error off, and rstd is but a factor. Without
  // a mean it is RMSNorm's gradient.
  Parameter weight(width, 1.0, random), mean(rows, 0.7, random), rstd(rows, 1.0, random);
  for (int64_t row = 0; row < rows; ++row) rstd.data[row] = std::abs(rstd.data[row]) / 4.0f;
  Parameter gamma(width, add ? 0.5 : 0.0, random), keep(samples, add ? 0.5 : 0.0, random);
  args.dweight = random.chance(0.8), args.dbias = random.chance(0.8);
  args.dgamma = gamma.data && random.chance(0.8);
  const bool has_sums = args.dweight || args.dbias || args.dgamma;
  const bool has_dx = add && random.chance(0.8), has_dresidual = random.chance(0.8);
  Elements dx(has_dx ? rows * width : 0, args.x_type, random);
  Elements dresidual(has_dresidual ? rows * width : 0, args.total_type, random);
  Elements sums(has_sums ? chunks * 6 * width : 0, deit::Scalar::f32, random);
  args.dout = dout.rows, args.total = total.rows;
  if (args.dgamma) args.x = x.rows;
  if (add) args.dtotal = dtotal.rows;
  if (has_dx) args.dx = dx.memory.data();
  args.weight = weight.data, args.mean = mean.data, args.rstd = rstd.data;
  args.gamma = gamma.data, args.keep = keep.data;
  if (has_dresidual) args.dresidual = dresidual.memory.data();
  if (has_sums) args.sums = sums.memory.floats();
  args.rows = rows, args.channels = width, args.rows_per_sample = rows / samples;
  run(chunks, 0, {&dx, &dresidual, &sums}, random, [&](float*, int64_t begin, int64_t end) {
    set.layer_norm.gradient(args, begin, end);
  });

  std::vector<double> expected(static_cast<size_t>(chunks * 3 * width));
  std::vector<double> xhat(static_cast<size_t>(width));
  const double share = 1.0 / static_cast<double>(width);
  for (int64_t row = 0; row < rows; ++row) {
    double* of_weight = expected.data() + row / deit::kRowChunk * 3 * width;
    double average = 0.0, plain = 0.0, along = 0.0;
    for (int64_t i = 0; args.mean && i < width; ++i) average += total.at(row, i) * share;
    for (int64_t i = 0; i < width; ++i) {
      double& value = xhat[static_cast<size_t>(i)];
      value = (total.at(row, i) - average) * rstd.at(row, 1.0);
      const double dy = dout.at(row, i), wdy = dy * weight.at(i, 1.0);
      if (args.mean) plain += wdy * share;
      along += wdy * value * share;
      if (args.dweight) of_weight[i] += dy * value;
      if (args.dbias) of_weight[width + i] += dy;
    }
    for (int64_t i = 0; i < width; ++i) {
      const double wdy = dout.at(row, i) * weight.at(i, 1.0);
      double g = rstd.at(row, 1.0) * (wdy - plain - xhat[static_cast<size_t>(i)] * along);
      if (add) g += dtotal.at(row, i);
      const int64_t at = row * width + i;
      if (has_dresidual) near("dresidual", at, dresidual.at(at), g, args.total_type);
      g *= keep.at(row / args.rows_per_sample, 1.0);
      if (has_dx) near("dx", at, dx.at(at), g * gamma.at(i, 1.0), args.x_type);
      if (args.dgamma) of_weight[2 * width + i] += g * x.at(row, i);
    }
  }
  const bool wanted[] = {args.dweight, args.dbias, args.dgamma};
  for (int64_t i = 0; has_sums && i < chunks * 3 * width; ++i) {  // [chunks, 2, 3, D], high and low
    if (!wanted[i / width % 3]) continue;
    const int64_t high = i + i / (3 * width) * 3 * width;
    near("sums", i, sums.at(high) + sums.at(high + 3 * width), expected[static_cast<size_t>(i)],
         deit::Scalar::f32);
  }
}

}  // namespace fuzz
