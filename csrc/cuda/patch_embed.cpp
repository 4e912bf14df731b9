// `patch_embed` on CUDA: checks, the output, and the launch.
#include "patch_embed.h"

#include "call.h"

namespace deit {
namespace {

Tensor whole(const char* name, const Tensor& value, int64_t numel, const Tensor& like) {
  check_parameter(name, value, numel, like);
  STD_TORCH_CHECK(value.scalar_type() == like.scalar_type(), name, ": expected images' dtype");
  return value.is_contiguous() ? value : torch::stable::contiguous(value);
}

Tensor patch_embed(Tensor images, Tensor weight, std::optional<Tensor> bias, Tensor prefix,
                   Tensor pos_embed) {
  STD_TORCH_CHECK(images.dim() == 4 && weight.dim() == 4 && images.size(1) == weight.size(1) &&
                      prefix.dim() == 3,
                  "weight: expected [D, C, P, P] for images [B, C, H, W]");
  const Scalar type = scalar_of("images", images);
  PatchEmbedArgs args{};
  args.batch = images.size(0);
  args.channels = images.size(1);
  args.width = weight.size(0);
  args.high = weight.size(2);
  args.wide = weight.size(3);
  STD_TORCH_CHECK(args.high > 0 && args.wide > 0 && images.size(2) % args.high == 0 &&
                      images.size(3) % args.wide == 0,
                  "images: expected height and width multiples of the patch");
  args.down = images.size(2) / args.high;
  args.across = images.size(3) / args.wide;
  args.before = prefix.size(1);
  const int64_t patches = args.down * args.across, tokens = args.before + patches;
  const int64_t depth = args.channels * args.high * args.wide;
  check_counts("patch_embed", args.batch * patches, args.width, depth);
  check_counts("patch_embed", tokens, patches, 0);
  weight = whole("weight", weight, args.width * depth, images);
  prefix = whole("prefix", prefix, args.before * args.width, images);
  pos_embed = whole("pos_embed", pos_embed, tokens * args.width, images);
  Tensor held;
  args.bias = bias_of(bias, args.width, images, held);
  Tensor out = torch::stable::new_empty(images, {args.batch, tokens, args.width});
  if (out.numel() == 0) return out;
  args.images = images.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.prefix = prefix.const_data_ptr();
  args.pos_embed = pos_embed.const_data_ptr();
  args.out = out.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) args.strides[i] = images.stride(i);
  const Call call(images);
  queued("patch_embed", launch_patch_embed(args, type, call.stream));
  return out;
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cuda, DEIT_DEVICE, m) {
  m.impl("patch_embed", TORCH_BOX(&deit::patch_embed));
}
