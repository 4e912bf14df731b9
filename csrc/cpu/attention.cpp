// Training of the norms and of attention on the CPU (kernels/ops.py): checks, outputs, and the
// split over threads.
#include <tuple>

#include "launch_training.h"

namespace deit {
namespace {

using torch::stable::parallel_for;

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

// Completes `args`, whose row tensors are described and what is wanted of it, and runs it: (dweight,
// dbias, dgamma).
std::tuple<Tensor, Tensor, Tensor> run_layer_norm_gradient(LayerNormGradientArgs& args,
                                                           const Tensor& total,
                                                           const Tensor& weight,
                                                           const Tensor& mean, const Tensor& rstd,
                                                           const Optional& gamma) {
  args.channels = last(total);
  args.rows = args.channels == 0 ? 0 : total.numel() / args.channels;
  Tensor held[4];
  args.weight = parameter("weight", weight, args.channels, total, held[0]);
  args.mean = parameter("mean", mean, args.rows, total, held[1]);
  args.rstd = parameter("rstd", rstd, args.rows, total, held[2]);
  args.gamma = parameter("gamma", gamma, args.channels, total, held[3]);
  args.dgamma = args.dgamma && args.gamma;
  const bool sums_rows = args.dweight || args.dbias || args.dgamma;
  const int64_t chunks = blocks(args.rows, kRowChunk), low = 3 * args.channels;
  const Buffer sums = allocate(static_cast<size_t>(sums_rows ? chunks * 2 * low : 0));
  args.sums = sums_rows ? sums.get() : nullptr;
  const TrainingKernels& set = kernels().training;
  parallel_for(0, chunks, std::max<int64_t>(1, kGrain / (kRowChunk * args.channels + 1)),
               [&](int64_t begin, int64_t end) { set.layer_norm_gradient(args, begin, end); });
  const auto total_of = [&](bool wanted, int64_t slot, const Optional& like) {
    if (!wanted) return none(weight);
    return sum_of_chunks(args.sums + slot * args.channels, chunks, low, args.channels, *like);
  };
  return {total_of(args.dweight, 0, weight), total_of(args.dbias, 1, weight),
          total_of(args.dgamma, 2, gamma)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dout, Tensor x, Tensor weight,
                                                  Tensor mean, Tensor rstd,
                                                  std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 3);
  STD_TORCH_CHECK(same_shape(dout, x), "dout: expected x's shape");
  STD_TORCH_CHECK(dout.scalar_type() == x.scalar_type(), "dout: expected x's dtype");
  Tensor dx = wants[0] ? torch::stable::new_empty(x, x.sizes()) : none(x);
  LayerNormGradientArgs args{};
  args.x_type = args.total_type = scalar_of("x", x);
  args.dout = rows_of(dout);
  args.total = rows_of(x);
  args.dresidual = wants[0] ? dx.mutable_data_ptr() : nullptr;
  args.dweight = wants[1];
  args.dbias = wants[2];
  auto [dweight, dbias, _] = run_layer_norm_gradient(args, x, weight, mean, rstd, std::nullopt);
  return {dx, dweight, dbias};
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
  Tensor x_held = args.dgamma ? required("x", x) : dout, keep_held;
  if (args.dgamma) args.x = rows_of(x_held);
  args.keep = parameter("keep", keep, total.size(0), total, keep_held);
  args.rows_per_sample = 1;
  for (int64_t d = 1; d < total.dim() - 1; ++d) args.rows_per_sample *= total.size(d);
  auto [dweight, dbias, dgamma] = run_layer_norm_gradient(args, total, weight, mean, rstd, gamma);
  return {dx, dresidual, dweight, dbias, dgamma};
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor qkv, int64_t num_heads, double scale,
                                         Optional key_bias) {
  Tensor lse;
  Tensor out = attention_of(qkv, num_heads, scale, key_bias, &lse);
  return {out, lse};
}

Tensor attention_bwd(Tensor dout, Tensor qkv, Tensor /*out*/, Tensor /*lse*/, int64_t num_heads,
                     double scale, Optional key_bias) {
  STD_TORCH_CHECK(qkv.dim() == 3 && num_heads > 0 && qkv.size(2) % (3 * num_heads) == 0,
                  "qkv: expected [B, N, 3 * D] with D a multiple of num_heads=", num_heads);
  STD_TORCH_CHECK(dout.dim() == 3 && dout.size(0) == qkv.size(0) && dout.size(1) == qkv.size(1) &&
                      3 * dout.size(2) == qkv.size(2) && dout.scalar_type() == qkv.scalar_type(),
                  "dout: expected [B, N, D] in qkv's dtype");
  AttentionGradientArgs args{};
  args.type = scalar_of("qkv", qkv);
  args.batch = qkv.size(0);
  args.tokens = qkv.size(1);
  args.heads = num_heads;
  args.head_dim = qkv.size(2) / (3 * num_heads);
  args.scale = static_cast<float>(scale);
  Tensor bias_held;
  args.key_bias = parameter("key_bias", key_bias, args.batch * args.tokens, qkv, bias_held);
  Tensor dqkv = torch::stable::new_empty(qkv, qkv.sizes());
  if (dqkv.numel() == 0) return dqkv;
  qkv = with_contiguous_last_axis(qkv);
  dout = with_contiguous_last_axis(dout);
  args.qkv = qkv.const_data_ptr();
  args.dout = dout.const_data_ptr();
  args.dqkv = dqkv.mutable_data_ptr();
  args.stride_batch = qkv.stride(0);
  args.stride_token = qkv.stride(1);
  args.dout_stride_batch = dout.stride(0);
  args.dout_stride_token = dout.stride(1);
  const TrainingKernels& set = kernels().training;
  set.plan_attention_gradient(args);
  const size_t workspace_floats = set.attention_gradient_workspace(args);
  const int64_t work = 5 * args.tokens * args.tokens * args.head_dim;
  parallel_for(0, args.batch * args.heads, grain_of(work), [&](int64_t begin, int64_t end) {
    const Buffer workspace = allocate(workspace_floats);
    set.attention_gradient(args, workspace.get(), begin, end);
  });
  return dqkv;
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&deit::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&deit::layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&deit::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&deit::add_layer_norm_bwd));
  m.impl("attention_fwd", TORCH_BOX(&deit::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&deit::attention_bwd));
}
