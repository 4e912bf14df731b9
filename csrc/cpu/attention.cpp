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

Rope rope_of(Positions& positions, const Tensor& x, int64_t heads, int64_t head_dim) {
  Tensor &sin = positions.sin, &cos = positions.cos;
  const int64_t tokens = x.size(1), prefix = positions.prefix, axes = sin.dim();
  STD_TORCH_CHECK(head_dim % 2 == 0, "sin and cos: expected an even head dimension; got ", head_dim);
  STD_TORCH_CHECK(prefix >= 0 && prefix <= tokens, "prefix: expected 0 to ", tokens, "; got ",
                  prefix);
  STD_TORCH_CHECK((axes == 2 || (axes == 3 && sin.size(0) == heads)) &&
                      sin.size(axes - 2) == tokens - prefix && sin.size(axes - 1) == head_dim,
                  "sin: expected [N - prefix, d] or [H, N - prefix, d]");
  STD_TORCH_CHECK(same_shape(sin, cos), "cos: expected sin's shape");
  for (Tensor* table : {&sin, &cos}) {
    STD_TORCH_CHECK(table->device() == x.device(), "sin and cos: expected on the input's device");
    scalar_of("sin and cos", *table);
    if (table->scalar_type() != ScalarType::Float) {
      *table = torch::stable::to(*table, ScalarType::Float);
    }
    *table = with_contiguous_last_axis(*table);
  }
  const bool alike = sin.stride(axes - 2) == cos.stride(axes - 2) &&
                     (axes == 2 || sin.stride(0) == cos.stride(0));
  if (!alike) {
    sin = torch::stable::contiguous(sin);
    cos = torch::stable::contiguous(cos);
  }
  if (sin.numel() == 0) return {};  // every token is of the prefix
  return {static_cast<const float*>(sin.const_data_ptr()),
          static_cast<const float*>(cos.const_data_ptr()),
          axes == 3 ? sin.stride(0) : 0,
          sin.stride(axes - 2),
          prefix,
          positions.interleaved};
}

namespace {

// What the forward's arguments and the gradient's have in common.
template <class Args>
Args described(const Tensor& qkv, int64_t num_heads, double scale, Positions* positions) {
  STD_TORCH_CHECK(qkv.dim() == 3 && num_heads > 0 && qkv.size(2) % (3 * num_heads) == 0,
                  "qkv: expected [B, N, 3 * D] with D a multiple of num_heads=", num_heads);
  Args args{};
  args.type = scalar_of("qkv", qkv);
  args.batch = qkv.size(0);
  args.tokens = qkv.size(1);
  args.heads = num_heads;
  args.head_dim = qkv.size(2) / (3 * num_heads);
  args.scale = static_cast<float>(scale);
  if (positions) args.rope = rope_of(*positions, qkv, num_heads, args.head_dim);
  return args;
}

}  // namespace

Tensor attention_of(Tensor qkv, int64_t num_heads, double scale, Optional key_bias, Tensor* lse,
                    Positions* positions) {
  AttentionArgs args = described<AttentionArgs>(qkv, num_heads, scale, positions);
  Held bias_held;
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

Tensor differentiate(Tensor dout, Tensor qkv, int64_t num_heads, double scale, Optional key_bias,
                     Positions* positions) {
  AttentionGradientArgs args = described<AttentionGradientArgs>(qkv, num_heads, scale, positions);
  STD_TORCH_CHECK(dout.dim() == 3 && dout.size(0) == qkv.size(0) && dout.size(1) == qkv.size(1) &&
                      3 * dout.size(2) == qkv.size(2) && dout.scalar_type() == qkv.scalar_type(),
                  "dout: expected [B, N, D] in qkv's dtype");
  Held bias_held;
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
  return differentiate(dout, qkv, num_heads, scale, key_bias, nullptr);
}

Tensor rotary_attention(Tensor qkv, int64_t num_heads, double scale, Tensor sin, Tensor cos,
                        int64_t prefix, bool interleaved) {
  Positions positions{sin, cos, prefix, interleaved};
  return attention_of(qkv, num_heads, scale, std::nullopt, nullptr, &positions);
}

std::tuple<Tensor, Tensor> rotary_attention_fwd(Tensor qkv, int64_t num_heads, double scale,
                                                Tensor sin, Tensor cos, int64_t prefix,
                                                bool interleaved) {
  Positions positions{sin, cos, prefix, interleaved};
  Tensor lse;
  Tensor out = attention_of(qkv, num_heads, scale, std::nullopt, &lse, &positions);
  return {out, lse};
}

Tensor rotary_attention_bwd(Tensor dout, Tensor qkv, Tensor /*out*/, Tensor /*lse*/,
                            int64_t num_heads, double scale, Tensor sin, Tensor cos,
                            int64_t prefix, bool interleaved) {
  Positions positions{sin, cos, prefix, interleaved};
  return differentiate(dout, qkv, num_heads, scale, std::nullopt, &positions);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&deit::attention));
  m.impl("attention_fwd", TORCH_BOX(&deit::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&deit::attention_bwd));
  m.impl("rotary_attention", TORCH_BOX(&deit::rotary_attention));
  m.impl("rotary_attention_fwd", TORCH_BOX(&deit::rotary_attention_fwd));
  m.impl("rotary_attention_bwd", TORCH_BOX(&deit::rotary_attention_bwd));
}
