// Linear layers and MLPs in 8-bit integers on the CPU: checks, outputs, and the split over threads.
#include <vector>

#include "int8_launch.h"

namespace deit {
namespace {

// What both operators read beside their weights, in the order of their schemas.
struct Inputs {
  Tensor x;
  Optional norm_weight, norm_bias;
  double eps;
  Optional residual;
};

Tensor run(Inputs& in, Int8Args& args, int64_t features) {
  Tensor& x = in.x;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected fp32");
  Tensor held[2];
  args.norm.channels = args.first.depth;
  args.norm.eps = static_cast<float>(in.eps);
  args.norm.weight = fp32_vector("norm_weight", in.norm_weight, args.norm.channels, x, held[0]);
  args.norm.bias = fp32_vector("norm_bias", in.norm_bias, args.norm.channels, x, held[1]);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = features;
  Tensor out = torch::stable::new_empty(x, sizes);
  if (in.residual.has_value()) {
    check_residual(out, *in.residual);
    if (out.numel() > 0) args.residual = rows_of(*in.residual);
  }
  if (out.numel() == 0) return out;
  args.x = rows_of(x);
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.rows = out.numel() / features;
  run_int8(args);
  return out;
}

Tensor int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor sums, Optional bias,
                   Optional norm_weight, Optional norm_bias, double eps,
                   bool gelu, Optional residual, Optional gamma) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  STD_TORCH_CHECK(!gelu || (!gamma.has_value() && !residual.has_value()),
                  "gelu: expected neither residual nor gamma beside it");
  Int8Args args{};
  Buffer columns;
  const int64_t depth = x.size(x.dim() - 1);
  args.first = weight_of(x, depth, packed, scales, sums, bias, gamma, columns);
  args.gelu = gelu;
  Inputs in{x, norm_weight, norm_bias, eps, residual};
  return run(in, args, args.first.features);
}

Tensor int8_gelu_mlp(Tensor x, Tensor packed1, Tensor scales1, Tensor sums1,
                     Optional b1, Tensor packed2, Tensor scales2, Tensor sums2,
                     Optional b2, Optional norm_weight,
                     Optional norm_bias, double eps, Optional residual,
                     Optional gamma) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  Int8Args args{};
  Buffer columns[2];
  const int64_t depth = x.size(x.dim() - 1);
  args.first = weight_of(x, depth, packed1, scales1, sums1, b1, std::nullopt, columns[0]);
  args.second =
      weight_of(x, args.first.features, packed2, scales2, sums2, b2, gamma, columns[1]);
  Inputs in{x, norm_weight, norm_bias, eps, residual};
  return run(in, args, args.second.features);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("int8_linear_packed", TORCH_BOX(&deit::int8_linear));
  m.impl("int8_gelu_mlp_packed", TORCH_BOX(&deit::int8_gelu_mlp));
}
