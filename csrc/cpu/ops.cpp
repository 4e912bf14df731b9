// The operators of kernels/ops.py on the CPU: checks, outputs, and the split over threads.
#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "../common/tensors.h"
#include "isa.h"

namespace deit {
namespace {

// Elements below which another thread costs more than it saves; PyTorch's own figure.
constexpr int64_t kGrain = 32768;

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], FreeAligned>;

Buffer allocate(size_t floats) {
  void* memory = ::operator new[](floats * sizeof(float), std::align_val_t{64});
  return Buffer(static_cast<float*>(memory));
}

// A parameter as contiguous fp32, which `holder` keeps alive: D or B * N elements at most, so
// one conversion a call replaces a kernel for every mixture of dtypes.
const float* parameter(const char* name, const std::optional<Tensor>& value, int64_t numel,
                       const Tensor& like, Tensor& holder) {
  if (!value.has_value()) return nullptr;
  check_parameter(name, *value, numel, like);
  scalar_of(name, *value);
  holder = *value;
  if (holder.scalar_type() != ScalarType::Float) {
    holder = torch::stable::to(holder, ScalarType::Float);
  }
  if (!holder.is_contiguous()) holder = torch::stable::contiguous(holder);
  return static_cast<const float*>(holder.const_data_ptr());
}

void run_layer_norm(const LayerNormArgs& args, int64_t rows) {
  const Kernels& set = kernels();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.channels));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const Buffer workspace = allocate(set.layer_norm_workspace(args));
    set.layer_norm(args, workspace.get(), begin, end);
  });
}

Tensor layer_norm(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  LayerNormArgs args{};
  args.x_type = args.residual_type = scalar_of("x", x);
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor weight_held, bias_held;
  args.weight = parameter("weight", weight, args.channels, x, weight_held);
  args.bias = parameter("bias", bias, args.channels, x, bias_held);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (out.numel() == 0) return out;
  args.x = rows_of(x);
  args.out = out.mutable_data_ptr();
  run_layer_norm(args, out.numel() / args.channels);
  return out;
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, Tensor residual, Tensor weight,
                                          std::optional<Tensor> bias, double eps,
                                          std::optional<Tensor> gamma,
                                          std::optional<Tensor> keep) {
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

Tensor attention(Tensor qkv, int64_t num_heads, double scale, std::optional<Tensor> key_bias) {
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

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&deit::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&deit::add_layer_norm));
  m.impl("attention", TORCH_BOX(&deit::attention));
}
