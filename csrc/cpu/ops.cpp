// The operators of kernels/ops.py on the CPU: checks, outputs, and the split over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace deit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

Scalar scalar_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Scalar::f32;
    case ScalarType::Half: return Scalar::f16;
    case ScalarType::BFloat16: return Scalar::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected fp32, fp16 or bf16");
  return Scalar::f32;
}

Tensor with_contiguous_last_axis(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool already = tensor.size(last) == 1 || tensor.stride(last) == 1;
  return already ? tensor : torch::stable::contiguous(tensor);
}

// Merges the leading axes that memory lets merge. False where more than kMaxLeadingDims remain.
bool merge_rows(const Tensor& tensor, Rows& rows) {
  rows.data = tensor.const_data_ptr();
  rows.dims = 0;
  for (int64_t d = 0; d < tensor.dim() - 1; ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    if (rows.dims > 0 && rows.strides[rows.dims - 1] == size * stride) {
      rows.sizes[rows.dims - 1] *= size;
      rows.strides[rows.dims - 1] = stride;
      continue;
    }
    if (rows.dims == kMaxLeadingDims) return false;
    rows.sizes[rows.dims] = size;
    rows.strides[rows.dims++] = stride;
  }
  return true;
}

// `tensor` is replaced by a copy where its strides cannot be described.
Rows rows_of(Tensor& tensor) {
  tensor = with_contiguous_last_axis(tensor);
  Rows rows{};
  if (!merge_rows(tensor, rows)) {
    tensor = torch::stable::contiguous(tensor);
    merge_rows(tensor, rows);
  }
  return rows;
}

// A [n] or [B, N] parameter as contiguous fp32, which `holder` keeps alive.
const float* parameter(const char* name, const std::optional<Tensor>& value, int64_t numel,
                       Tensor& holder) {
  if (!value.has_value()) return nullptr;
  STD_TORCH_CHECK(value->is_cpu() && value->numel() == numel, name, ": expected ", numel,
                  " elements on the CPU; got ", value->numel());
  scalar_of(name, *value);
  holder = *value;
  if (holder.scalar_type() != ScalarType::Float) {
    holder = torch::stable::to(holder, ScalarType::Float);
  }
  if (!holder.is_contiguous()) holder = torch::stable::contiguous(holder);
  return static_cast<const float*>(holder.const_data_ptr());
}

void check_input(const char* name, const Tensor& x, int64_t min_rank) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(x.dim() >= min_rank, name, ": expected rank >= ", min_rank, "; got ", x.dim());
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
  check_input("x", x, 1);
  LayerNormArgs args{};
  args.x_type = args.residual_type = scalar_of("x", x);
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor weight_held, bias_held;
  args.weight = parameter("weight", weight, args.channels, weight_held);
  args.bias = parameter("bias", bias, args.channels, bias_held);
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
  check_input("x", x, 1);
  check_input("residual", residual, 1);
  STD_TORCH_CHECK(x.dim() == residual.dim() &&
                      std::equal(x.sizes().begin(), x.sizes().end(), residual.sizes().begin()),
                  "residual: expected x's shape");
  LayerNormArgs args{};
  args.x_type = scalar_of("x", x);
  args.residual_type = scalar_of("residual", residual);
  STD_TORCH_CHECK(args.residual_type == args.x_type || args.residual_type == Scalar::f32,
                  "residual: expected x's dtype or fp32");
  args.channels = x.size(x.dim() - 1);
  args.eps = static_cast<float>(eps);
  Tensor held[4];
  args.weight = parameter("weight", weight, args.channels, held[0]);
  args.bias = parameter("bias", bias, args.channels, held[1]);
  args.gamma = parameter("gamma", gamma, args.channels, held[2]);
  args.keep = parameter("keep", keep, x.size(0), held[3]);
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
  check_input("qkv", qkv, 3);
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
  args.key_bias = parameter("key_bias", key_bias, args.batch * args.tokens, bias_held);
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
