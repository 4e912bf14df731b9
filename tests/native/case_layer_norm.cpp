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
  run(x.count, set.layer_norm_workspace(args), {&out, &sum}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.layer_norm(args, workspace, begin, end);
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
      mean += y / static_cast<double>(width);
    }
    for (const double y : total) variance += (y - mean) * (y - mean) / static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) {
      const double y = (total[static_cast<size_t>(i)] - mean) / std::sqrt(variance + 1e-5);
      near("out", row * width + i, out.at(row * width + i),
           y * weight.at(i, 1.0) + bias.at(i, 0.0), out.type);
    }
  }
}

}  // namespace fuzz
