// The operators of kernels/ops.py on the CPU: checks, outputs, and the split over threads.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "launch_product.h"

namespace deit {
namespace {

void save_statistics(const Tensor& x, Statistics* saved, LayerNormArgs& args) {
  if (saved == nullptr) return;
  const auto rows = x.sizes().slice(0, x.dim() - 1);
  saved->mean = torch::stable::new_empty(x, rows, ScalarType::Float);
  saved->rstd = torch::stable::new_empty(x, rows, ScalarType::Float);
  args.mean = static_cast<float*>(saved->mean.mutable_data_ptr());
  args.rstd = static_cast<float*>(saved->rstd.mutable_data_ptr());
}

}  // namespace

void run_layer_norm(const LayerNormArgs& args, int64_t rows) {
  const Kernels& set = kernels();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.channels));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const Buffer workspace = allocate(set.layer_norm_workspace(args));
    set.layer_norm(args, workspace.get(), begin, end);
  });
}

void run_product(ProductArgs args) {
  if (args.rows == 0 || args.width == 0) return;
  const Kernels& set = kernels();
  set.plan_product(args, torch::stable::get_num_threads());
  // A task's multiply-adds against those of an elementwise operation's grain.
  const int64_t work = args.row_block * args.depth * args.width / args.panels / 4;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, args.tasks, grain, [&](int64_t begin, int64_t end) {
    const Buffer workspace = allocate(set.product_workspace(args));
    set.product(args, workspace.get(), begin, end);
  });
}

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

void run_attention(AttentionArgs args) {
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
  run_attention(args);
  return out;
}

Tensor linear_of_thirds(const Tensor& x, const Tensor& weight, const std::vector<Tensor>& others,
                        const std::optional<Tensor>& bias) {
  Product product(x, weight, bias, others);
  product.allocate_out(x);
  run_product(product.args);
  return product.out;
}

Tensor linear_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 Activation activation, const std::optional<Tensor>& residual,
                 const std::optional<Tensor>& gamma, const std::optional<Tensor>& keep) {
  Product product(x, weight, bias);
  product.add_epilogue(x, residual, gamma, keep);
  product.args.activation = activation;
  product.allocate_out(x);
  run_product(product.args);
  return product.out;
}

namespace {

// Rows of the MLP that go through both products before the next ones: their hidden layer, 9.4 MB
// in fp32 at 3072 channels, stays in the last-level cache, and no more is ever allocated.
constexpr int64_t kMlpRows = 800;

// `first` into its out, a buffer of `block` rows, and `second` from there, block by block.
void run_mlp(ProductArgs first, ProductArgs second, int64_t block, int64_t rows) {
  const char* x = static_cast<const char*>(first.x);
  const char* residual = static_cast<const char*>(second.residual);
  char* out = static_cast<char*>(second.out);
  const int64_t in_row = first.depth * static_cast<int64_t>(sizeof(float));
  const int64_t out_row = second.width * (second.out_type == Scalar::f32 ? 4 : 2);
  second.x = first.out;
  for (int64_t row = 0; row < rows; row += block) {
    first.rows = second.rows = std::min(block, rows - row);
    first.x = x + row * in_row;
    if (residual) second.residual = residual + row * out_row;
    second.out = out + row * out_row;
    second.first_row = row;
    run_product(first);
    run_product(second);
  }
}

}  // namespace

Tensor gelu_mlp_of(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                   const Tensor& w2, const std::optional<Tensor>& b2,
                   const std::optional<Tensor>& residual, const std::optional<Tensor>& gamma,
                   const std::optional<Tensor>& keep) {
  Product first(x, w1, b1);
  const int64_t rows = first.args.rows, block = std::min(rows, kMlpRows);
  Tensor hidden = torch::stable::new_empty(x, {block, first.args.width});
  Product second(hidden, w2, b2);
  first.args.activation = Activation::gelu;
  first.args.out = hidden.mutable_data_ptr();
  second.args.rows = rows;
  second.add_epilogue(x, residual, gamma, keep);
  second.allocate_out(x);
  run_mlp(first.args, second.args, block, rows);
  return second.out;
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

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias,
              std::optional<std::string> activation, std::optional<Tensor> residual,
              std::optional<Tensor> gamma, std::optional<Tensor> keep) {
  return linear_of(x, weight, bias, activation_of(activation), residual, gamma, keep);
}

Tensor linear_thirds(Tensor x, Tensor first, Tensor second, Tensor third,
                     std::optional<Tensor> bias) {
  return linear_of_thirds(x, first, {second, third}, bias);
}

Tensor gelu_mlp(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2,
                std::optional<Tensor> b2, std::optional<Tensor> residual,
                std::optional<Tensor> gamma, std::optional<Tensor> keep) {
  return gelu_mlp_of(x, w1, b1, w2, b2, residual, gamma, keep);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&deit::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&deit::add_layer_norm));
  m.impl("attention", TORCH_BOX(&deit::attention));
  m.impl("linear", TORCH_BOX(&deit::linear));
  m.impl("linear_thirds", TORCH_BOX(&deit::linear_thirds));
  m.impl("gelu_mlp", TORCH_BOX(&deit::gelu_mlp));
}
