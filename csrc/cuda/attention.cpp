// `attention` on CUDA: checks, the output, and the launch.
#include "attention.h"

#include "call.h"

namespace deit {
namespace {

Tensor attention(Tensor qkv, int64_t num_heads, double scale, std::optional<Tensor> key_bias) {
  STD_TORCH_CHECK(qkv.dim() == 3 && num_heads > 0 && qkv.size(2) % (3 * num_heads) == 0,
                  "qkv: expected [B, N, 3 * D] with D a multiple of num_heads=", num_heads);
  AttentionArgs args{};
  const Scalar type = scalar_of("qkv", qkv);
  args.batch = qkv.size(0);
  args.tokens = qkv.size(1);
  args.heads = num_heads;
  args.head_dim = qkv.size(2) / (3 * num_heads);
  args.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(args.head_dim <= kWidestHead, "qkv: expected heads of at most ", kWidestHead,
                  " channels; got ", args.head_dim);
  Tensor held;
  args.key_bias = values("key_bias", key_bias, args.batch * args.tokens, qkv, held);
  Tensor out = torch::stable::new_empty(qkv, {args.batch, args.tokens, num_heads * args.head_dim});
  if (out.numel() == 0) return out;
  check_counts("attention", args.batch * args.tokens * args.heads, args.tokens, qkv.size(2));
  qkv = with_contiguous_last_axis(qkv);
  args.qkv = qkv.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.stride_batch = qkv.stride(0);
  args.stride_token = qkv.stride(1);
  const Call call(qkv);
  queued("attention", launch_attention(args, type, call.stream));
  return out;
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cuda, DEIT_DEVICE, m) {
  m.impl("attention", TORCH_BOX(&deit::attention));
}
