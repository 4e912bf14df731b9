// The operators of kernels/ops.py on the CPU: checks, outputs, and the split over threads.
#include <algorithm>
#include <optional>
#include <tuple>

#include "launch.h"

namespace deit {
namespace {

void run_layer_norm(const LayerNormArgs& args, int64_t rows) {
  const Kernels& set = kernels();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.channels));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const Buffer workspace = allocate(set.layer_norm_workspace(args));
    set.layer_norm(args, workspace.get(), begin, end);
  });
}

void save_statistics(const Tensor& x, Statistics* saved, LayerNormArgs& args) {
  if (saved == nullptr) return;
  const auto rows = x.sizes().slice(0, x.dim() - 1);
  saved->mean = torch::stable::new_empty(x, rows, ScalarType::Float);
  saved->rstd = torch::stable::new_empty(x, rows, ScalarType::Float);
  args.mean = static_cast<float*>(saved->mean.mutable_data_ptr());
  args.rstd = static_cast<float*>(saved->rstd.mutable_data_ptr());
}

}  // namespace

Tensor layer_norm_of(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps,
                     Statistics* saved) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  LayerNormArgs args{};
  args.x_type = args.residual_type = scalar_of("x", x);
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor weight_held, bias_held;
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

std::tuple<Tensor, Tensor> add_layer_norm_of(Tensor x, Tensor residual, Tensor weight,
                                             std::optional<Tensor> bias, double eps,
                                             std::optional<Tensor> gamma,
                                             std::optional<Tensor> keep, Statistics* saved) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  check_residual(x, residual);
  LayerNormArgs args{};
  args.x_type = scalar_of("x", x);
  args.residual_type = scalar_of("residual", residual);
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor held[4];
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

Tensor attention_of(Tensor qkv, int64_t num_heads, double scale, std::optional<Tensor> key_bias,
                    Tensor* lse) {
  STD_TORCH_CHECK(qkv.dim() == 3 && num_heads > 0 && qkv.size(2) % (3 * num_heads) == 0,
                  "qkv: expected [B, N, 3 * D] with D a multiple of num_heads=", num_heads);
  AttentionArgs args{};
  args.type = scalar_of("qkv", qkv);
  args.batch = qkv.size(0);
  args.tokens = qkv.size(1);
  args.heads = num_heads;
  args.head_dim = qkv.size(2) / (3 * num_heads);
  args.scale = static_cast<float>(scale);
  Tensor bias_held;
  args.key_bias = parameter("key_bias", key_bias, args.batch * args.tokens, qkv,
                            bias_held);
  Tensor out = torch::stable::new_empty(qkv, {args.batch, args.tokens, num_heads * args.head_dim});
  if (lse) {
    *lse = torch::stable::new_empty(qkv, {args.batch, num_heads, args.tokens}, ScalarType::Float);
    args.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  if (out.numel() == 0) return out;
  qkv = with_contiguous_last_axis(qkv);
  args.qkv = qkv.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.stride_batch = qkv.stride(0);
  args.stride_token = qkv.stride(1);
  const Kernels& set = kernels();
  set.plan_attention(args);
  const size_t floats = set.attention_workspace(args);
  // A task's multiply-adds against those of an elementwise operation's grain.
  const int64_t work = 2 * args.query_tile * args.tokens * args.head_dim;
  const int64_t grain = std::max<int64_t>(1, 4 * kGrain / work);
  const int64_t tasks = args.batch * args.heads * args.tiles;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const Buffer workspace = allocate(floats);
    set.attention(args, workspace.get(), begin, end);
  });
  return out;
}

namespace {

Tensor layer_norm(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps) {
  return layer_norm_of(x, weight, bias, eps, nullptr);
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, Tensor residual, Tensor weight,
                                          std::optional<Tensor> bias, double eps,
                                          std::optional<Tensor> gamma,
                                          std::optional<Tensor> keep) {
  return add_layer_norm_of(x, residual, weight, bias, eps, gamma, keep, nullptr);
}

Tensor attention(Tensor qkv, int64_t num_heads, double scale, std::optional<Tensor> key_bias) {
  return attention_of(qkv, num_heads, scale, key_bias, nullptr);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&deit::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&deit::add_layer_norm));
  m.impl("attention", TORCH_BOX(&deit::attention));
}
