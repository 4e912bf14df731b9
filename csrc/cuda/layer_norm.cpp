// LayerNorm on CUDA, alone or after a residual addition: checks, outputs, and the launch on the
// current stream of the input's device. Asking for that stream needs libtorch_cuda, which is why
// this is a library of its own.
#include <tuple>

#include "call.h"
#include "layer_norm.h"

namespace deit {
namespace {

void run(const LayerNormArgs& args, Scalar residual_type, const Tensor& x) {
  const Call call(x);
  queued("layer_norm", launch_layer_norm(args, scalar_of("x", x), residual_type, call.stream));
}

Tensor layer_norm(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  LayerNormArgs args{};
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor held[2];
  args.weight = values("weight", weight, args.channels, x, held[0]);
  args.bias = values("bias", bias, args.channels, x, held[1]);
  const Scalar type = scalar_of("x", x);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (out.numel() == 0) return out;
  args.rows = out.numel() / args.channels;
  args.x = rows_of(x);
  args.out = out.mutable_data_ptr();
  run(args, type, x);
  return out;
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, Tensor residual, Tensor weight,
                                          std::optional<Tensor> bias, double eps,
                                          std::optional<Tensor> gamma,
                                          std::optional<Tensor> keep) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  scalar_of("x", x);
  check_residual(x, residual);
  LayerNormArgs args{};
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor held[4];
  args.weight = values("weight", weight, args.channels, x, held[0]);
  args.bias = values("bias", bias, args.channels, x, held[1]);
  args.gamma = values("gamma", gamma, args.channels, x, held[2]);
  args.keep = values("keep", keep, x.size(0), x, held[3]);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  Tensor sum = torch::stable::new_empty(residual, residual.sizes());
  if (out.numel() > 0) {
    args.rows = out.numel() / args.channels;
    args.rows_per_sample = args.rows / x.size(0);
    args.x = rows_of(x);
    args.residual = rows_of(residual);
    args.out = out.mutable_data_ptr();
    args.sum = sum.mutable_data_ptr();
    run(args, scalar_of("residual", residual), x);
  }
  return {out, sum};
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cuda, DEIT_DEVICE, m) {
  m.impl("layer_norm", TORCH_BOX(&deit::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&deit::add_layer_norm));
}
