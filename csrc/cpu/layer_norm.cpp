// LayerNorm on the CPU, alone or after a residual addition, and RMSNorm, in inference and in
// training: checks, outputs, and the split over threads.
#include <tuple>

#include "launch_training.h"

namespace deit {
namespace {

void save_statistics(const Tensor& x, Statistics* saved, LayerNormArgs& args) {
  if (saved == nullptr) return;
  const auto rows = x.sizes().slice(0, x.dim() - 1);
  if (!args.rms) {
    saved->mean = torch::stable::new_empty(x, rows, ScalarType::Float);
    args.mean = static_cast<float*>(saved->mean.mutable_data_ptr());
  }
  saved->rstd = torch::stable::new_empty(x, rows, ScalarType::Float);
  args.rstd = static_cast<float*>(saved->rstd.mutable_data_ptr());
}

void run_layer_norm(const LayerNormArgs& args, int64_t rows) {
  const LayerNormKernels& set = kernels().layer_norm;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.channels));
  over_threads(rows, grain, set.workspace(args), [&](float* workspace, int64_t begin, int64_t end) {
    set.forward(args, workspace, begin, end);
  });
}

Tensor norm_of(Tensor x, Tensor weight, Optional bias, double eps, bool rms, Statistics* saved) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  LayerNormArgs args{};
  args.rms = rms;
  args.x_type = args.residual_type = scalar_of("x", x);
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Held weight_held, bias_held;
  args.weight = parameter("weight", weight, args.channels, x, weight_held);
  args.bias = parameter("bias", bias, args.channels, x, bias_held);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  save_statistics(x, saved, args);
  if (out.numel() == 0) return out;
  args.x = rows_of(x);
  args.out = out.mutable_data_ptr();
  run_layer_norm(args, out.numel() / args.channels);
  return out;
}

}  // namespace

Tensor layer_norm_of(Tensor x, Tensor weight, Optional bias, double eps, Statistics* saved) {
  return norm_of(x, weight, bias, eps, false, saved);
}

namespace {

std::tuple<Tensor, Tensor> add_layer_norm_of(Tensor x, Tensor residual, Tensor weight,
                                             Optional bias, double eps, Optional gamma,
                                             Optional keep, Statistics* saved) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  check_residual(x, residual);
  LayerNormArgs args{};
  args.x_type = scalar_of("x", x);
  args.residual_type = scalar_of("residual", residual);
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Held held[4];
  args.weight = parameter("weight", weight, args.channels, x, held[0]);
  args.bias = parameter("bias", bias, args.channels, x, held[1]);
  args.gamma = parameter("gamma", gamma, args.channels, x, held[2]);
  args.keep = parameter("keep", keep, x.size(0), x, held[3]);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  Tensor sum = torch::stable::new_empty(residual, residual.sizes());
  save_statistics(x, saved, args);
  if (out.numel() > 0) {
    const int64_t rows = out.numel() / args.channels;
    args.rows_per_sample = rows / x.size(0);
    args.x = rows_of(x);
    args.residual = rows_of(residual);
    args.out = out.mutable_data_ptr();
    args.sum = sum.mutable_data_ptr();
    run_layer_norm(args, rows);
  }
  return {out, sum};
}

Tensor layer_norm(Tensor x, Tensor weight, Optional bias, double eps) {
  return layer_norm_of(x, weight, bias, eps, nullptr);
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, Tensor residual, Tensor weight,
                                          Optional bias, double eps, Optional gamma,
                                          Optional keep) {
  return add_layer_norm_of(x, residual, weight, bias, eps, gamma, keep, nullptr);
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  return norm_of(x, weight, std::nullopt, eps, true, nullptr);
}

std::tuple<Tensor, Tensor> rms_norm_fwd(Tensor x, Tensor weight, double eps) {
  Statistics saved;
  Tensor out = norm_of(x, weight, std::nullopt, eps, true, &saved);
  return {out, saved.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(Tensor x, Tensor weight, Optional bias,
                                                  double eps) {
  Statistics saved;
  Tensor out = layer_norm_of(x, weight, bias, eps, &saved);
  return {out, saved.mean, saved.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor x, Tensor residual,
                                                              Tensor weight, Optional bias,
                                                              double eps, Optional gamma,
                                                              Optional keep) {
  Statistics saved;
  auto [out, total] = add_layer_norm_of(x, residual, weight, bias, eps, gamma, keep, &saved);
  return {out, total, saved.mean, saved.rstd};
}

// Completes `args`, whose row tensors are described and what is wanted of it, and runs it:
// (dweight, dbias, dgamma).
std::tuple<Tensor, Tensor, Tensor> run_layer_norm_gradient(LayerNormGradientArgs& args,
                                                           const Tensor& total,
                                                           const Tensor& weight,
                                                           const Optional& mean,
                                                           const Tensor& rstd,
                                                           const Optional& gamma) {
  args.channels = last(total);
  args.rows = args.channels == 0 ? 0 : total.numel() / args.channels;
  Held held[4];
  args.weight = parameter("weight", weight, args.channels, total, held[0]);
  args.mean = parameter("mean", mean, args.rows, total, held[1]);
  args.rstd = parameter("rstd", rstd, args.rows, total, held[2]);
  args.gamma = parameter("gamma", gamma, args.channels, total, held[3]);
  args.dgamma = args.dgamma && args.gamma;
  const bool sums_rows = args.dweight || args.dbias || args.dgamma;
  const int64_t chunks = blocks(args.rows, kRowChunk), low = 3 * args.channels;
  const Buffer sums = allocate(static_cast<size_t>(sums_rows ? chunks * 2 * low : 0));
  args.sums = sums_rows ? sums.get() : nullptr;
  const LayerNormKernels& set = kernels().layer_norm;
  over_threads(
      chunks, std::max<int64_t>(1, kGrain / (kRowChunk * args.channels + 1)),
      [&](int64_t begin, int64_t end) { set.gradient(args, begin, end); });
  const auto total_of = [&](bool wanted, int64_t slot, const Optional& like) {
    if (!wanted) return none(weight);
    return sum_of_chunks(args.sums + slot * args.channels, chunks, low, args.channels, *like);
  };
  return {total_of(args.dweight, 0, weight), total_of(args.dbias, 1, weight),
          total_of(args.dgamma, 2, gamma)};
}

// mean: none for RMSNorm.
std::tuple<Tensor, Tensor, Tensor> norm_bwd(Tensor dout, Tensor x, Tensor weight, Optional mean,
                                            Tensor rstd, bool wants_x, bool wants_weight,
                                            bool wants_bias) {
  STD_TORCH_CHECK(same_shape(dout, x), "dout: expected x's shape");
  STD_TORCH_CHECK(dout.scalar_type() == x.scalar_type(), "dout: expected x's dtype");
  Tensor dx = wants_x ? torch::stable::new_empty(x, x.sizes()) : none(x);
  LayerNormGradientArgs args{};
  args.x_type = args.total_type = scalar_of("x", x);
  args.dout = rows_of(dout);
  args.total = rows_of(x);
  args.dresidual = wants_x ? dx.mutable_data_ptr() : nullptr;
  args.dweight = wants_weight;
  args.dbias = wants_bias;
  auto [dweight, dbias, _] = run_layer_norm_gradient(args, x, weight, mean, rstd, std::nullopt);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dout, Tensor x, Tensor weight,
                                                  Tensor mean, Tensor rstd,
                                                  std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 3);
  return norm_bwd(dout, x, weight, mean, rstd, wants[0], wants[1], wants[2]);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor dout, Tensor x, Tensor weight, Tensor rstd,
                                        std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 2);
  auto [dx, dweight, _] = norm_bwd(dout, x, weight, std::nullopt, rstd, wants[0], wants[1], false);
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
    Tensor dout, Tensor dtotal, Optional x, Tensor total, Tensor weight, Tensor mean, Tensor rstd,
    Optional gamma, Optional keep, std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 5);
  check_residual(dout, total);
  STD_TORCH_CHECK(same_shape(dtotal, dout), "dout, dtotal: expected x's shape");
  STD_TORCH_CHECK(dtotal.scalar_type() == total.scalar_type(), "dtotal: expected total's dtype");
  if (x.has_value()) {
    STD_TORCH_CHECK(same_shape(dout, *x), "dout, dtotal: expected x's shape");
    STD_TORCH_CHECK(dout.scalar_type() == x->scalar_type(), "dout: expected x's dtype");
  }
  Tensor dx = wants[0] ? torch::stable::new_empty(dout, dout.sizes()) : none(dout);
  Tensor dresidual = wants[1] ? torch::stable::new_empty(total, total.sizes()) : none(total);
  LayerNormGradientArgs args{};
  args.x_type = scalar_of("dout", dout);
  args.total_type = scalar_of("total", total);
  args.dout = rows_of(dout);
  args.dtotal = rows_of(dtotal);
  args.total = rows_of(total);
  args.dx = wants[0] ? dx.mutable_data_ptr() : nullptr;
  args.dresidual = wants[1] ? dresidual.mutable_data_ptr() : nullptr;
  args.dweight = wants[2];
  args.dbias = wants[3];
  args.dgamma = wants[4] && gamma.has_value();
  Tensor x_held = args.dgamma ? required("x", x) : dout;
  if (args.dgamma) args.x = rows_of(x_held);
  Held keep_held;
  args.keep = parameter("keep", keep, total.size(0), total, keep_held);
  args.rows_per_sample = 1;
  for (int64_t d = 1; d < total.dim() - 1; ++d) args.rows_per_sample *= total.size(d);
  auto [dweight, dbias, dgamma] = run_layer_norm_gradient(args, total, weight, mean, rstd, gamma);
  return {dx, dresidual, dweight, dbias, dgamma};
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&deit::layer_norm));
  m.impl("layer_norm_fwd", TORCH_BOX(&deit::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&deit::layer_norm_bwd));
  m.impl("rms_norm", TORCH_BOX(&deit::rms_norm));
  m.impl("rms_norm_fwd", TORCH_BOX(&deit::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&deit::rms_norm_bwd));
  m.impl("add_layer_norm", TORCH_BOX(&deit::add_layer_norm));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&deit::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&deit::add_layer_norm_bwd));
}
