// Attention on the CPU, in inference and in training: checks, outputs, and the split over threads.
#include <tuple>

#include "launch_training.h"

namespace deit {

void run_attention(AttentionArgs args) {
  const AttentionKernels& set = kernels().attention;
  set.plan(args);
  const int64_t work = 2 * args.query_tile * args.tokens * args.head_dim;
  over_threads(args.batch * args.heads * args.tiles, grain_of(work), set.workspace(args),
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.forward(args, workspace, begin, end);
               }, args.tiles);
}

Tensor attention_of(Tensor qkv, int64_t num_heads, double scale, Optional key_bias, Tensor* lse) {
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
  args.key_bias = parameter("key_bias", key_bias, args.batch * args.tokens, qkv, bias_held);
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

namespace {

Tensor attention(Tensor qkv, int64_t num_heads, double scale, Optional key_bias) {
  return attention_of(qkv, num_heads, scale, key_bias, nullptr);
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
  const AttentionKernels& set = kernels().attention;
  set.plan_gradient(args);
  const int64_t work = 5 * args.tokens * args.tokens * args.head_dim;
  over_threads(args.batch * args.heads, grain_of(work), set.gradient_workspace(args),
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.gradient(args, workspace, begin, end);
               });
  return dqkv;
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&deit::attention));
  m.impl("attention_fwd", TORCH_BOX(&deit::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&deit::attention_bwd));
}
