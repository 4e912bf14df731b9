// Cross-attention on the CPU, inference alone: checks, the output, and the split over threads.
#include "launch.h"

namespace deit {
namespace {

Tensor cross_attention(Tensor q, Tensor kv, int64_t num_heads, double scale) {
  STD_TORCH_CHECK(q.dim() == 3 && num_heads > 0 && q.size(2) % num_heads == 0,
                  "q: expected [B, R, D] with D a multiple of num_heads=", num_heads);
  STD_TORCH_CHECK(kv.dim() == 3 && kv.size(0) == q.size(0) && kv.size(2) == 2 * q.size(2) &&
                      kv.size(1) > 0,
                  "kv: expected [B, N, 2 * D] with N > 0");
  STD_TORCH_CHECK(kv.scalar_type() == q.scalar_type() && kv.device() == q.device(),
                  "kv: expected q's dtype and device");
  CrossAttentionArgs args{};
  args.type = scalar_of("q", q);
  args.batch = q.size(0);
  args.queries = q.size(1);
  args.tokens = kv.size(1);
  args.heads = num_heads;
  args.head_dim = q.size(2) / num_heads;
  args.scale = static_cast<float>(scale);
  Tensor out = torch::stable::new_empty(q, {args.batch, args.queries, q.size(2)});
  if (out.numel() == 0) return out;
  q = with_contiguous_last_axis(q);
  kv = with_contiguous_last_axis(kv);
  args.q = q.const_data_ptr();
  args.kv = kv.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.q_stride_batch = q.stride(0);
  args.q_stride_token = q.stride(1);
  args.kv_stride_batch = kv.stride(0);
  args.kv_stride_token = kv.stride(1);
  const CrossAttentionKernels& set = kernels().cross_attention;
  over_threads(args.batch * args.heads * args.queries, grain_of(2 * args.tokens * args.head_dim),
               set.workspace(args), [&](float* workspace, int64_t begin, int64_t end) {
                 set.forward(args, workspace, begin, end);
               });
  return out;
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("cross_attention", TORCH_BOX(&deit::cross_attention));
}
