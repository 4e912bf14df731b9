// The patch embedding on the CPU. A band of an image's patches is gathered into rows, which stay in
// the second-level cache, and multiplied by the projection. Its bias and the positions are added as
// the sums leave the registers, straight into the token sequence. Backward, the projection's gradient
// is a linear layer's whose inputs are read from the images.
#include <algorithm>
#include <cstring>

#include "launch_linear.h"

namespace deit {
namespace {

// Patches of one task: all 196 of an image at 224 pixels, 600 KB in fp32. More of them reuse a
// panel of weights more often; fewer leave more of the cache to it.
constexpr int64_t kBand = 200;
// From this many images on, the weights are packed once for all of them.
constexpr int64_t kLeastImages = 4;

// Patches [first, first + count) of image `b` as rows [channels * height * width], of elements of
// so many bytes.
void gather(const Images& in, int64_t bytes, int64_t b, int64_t first, int64_t count, char* to) {
  const int64_t line = in.width * bytes;
  for (int64_t patch = first; patch < first + count; ++patch) {
    const int64_t top = patch / in.across * in.height, left = patch % in.across * in.width;
    for (int64_t c = 0; c < in.channels; ++c) {
      for (int64_t y = 0; y < in.height; ++y, to += line) {
        const char* from =
            static_cast<const char*>(in.data) +
            bytes * (b * in.strides[0] + c * in.strides[1] + (top + y) * in.strides[2] +
                     left * in.strides[3]);
        if (in.strides[3] == 1) {
          std::memcpy(to, from, static_cast<size_t>(line));
          continue;
        }
        for (int64_t x = 0; x < in.width; ++x) {
          std::memcpy(to + x * bytes, from + x * in.strides[3] * bytes,
                      static_cast<size_t>(bytes));
        }
      }
    }
  }
}

// prefix + pos into the first rows of an image's tokens.
template <class Element, class Add>
void add_prefix(const Element* prefix, const Element* pos, int64_t count, Element* out,
                const Add& add) {
  for (int64_t i = 0; i < count; ++i) out[i] = add(prefix[i], pos[i]);
}

float of_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t to_bf16(float value) {  // to nearest, halves to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void write_prefix(const Tensor& prefix, const Tensor& pos, Scalar type, int64_t count, char* out) {
  if (type == Scalar::f32) {
    add_prefix(static_cast<const float*>(prefix.const_data_ptr()),
               static_cast<const float*>(pos.const_data_ptr()), count,
               reinterpret_cast<float*>(out), [](float a, float b) { return a + b; });
  } else {
    add_prefix(static_cast<const uint16_t*>(prefix.const_data_ptr()),
               static_cast<const uint16_t*>(pos.const_data_ptr()), count,
               reinterpret_cast<uint16_t*>(out), [](uint16_t a, uint16_t b) {
                 return to_bf16(of_bf16(a) + of_bf16(b));
               });
  }
}

Tensor whole(const char* name, const Tensor& value, int64_t numel, const Tensor& like) {
  check_parameter(name, value, numel, like);
  STD_TORCH_CHECK(value.scalar_type() == like.scalar_type(), name, ": expected images' dtype");
  return value.is_contiguous() ? value : torch::stable::contiguous(value);
}

// Images as `weight` [D, C, P, P] cuts them into patches.
Images cut(const Tensor& images, const Tensor& weight) {
  STD_TORCH_CHECK(images.dim() == 4 && weight.dim() == 4 && images.size(1) == weight.size(1),
                  "weight: expected [D, C, P, P] for images [B, C, H, W]");
  Images in{};
  in.channels = weight.size(1);
  in.height = weight.size(2);
  in.width = weight.size(3);
  STD_TORCH_CHECK(weight.numel() > 0 && images.size(2) % in.height == 0 &&
                      images.size(3) % in.width == 0,
                  "images: expected height and width multiples of the patch");
  in.across = images.size(3) / in.width;
  in.patches = images.size(2) / in.height * in.across;
  in.data = images.const_data_ptr();
  for (int i = 0; i < 4; ++i) in.strides[i] = images.stride(i);
  return in;
}

Tensor patch_embed(Tensor images, Tensor weight, Optional bias, Tensor prefix,
                   Tensor pos_embed) {
  const Images in = cut(images, weight);
  STD_TORCH_CHECK(prefix.dim() == 3, "prefix: expected [1, T, D]");
  const int64_t patches = in.patches, dim = weight.size(0);
  const int64_t first = prefix.size(1), tokens = first + patches, batch = images.size(0);
  ProductArgs product{};
  product.type = product.out_type = scalar_of("images", images);
  STD_TORCH_CHECK(product.type != Scalar::f16, "images: expected fp32 or bf16");
  const int64_t bytes = product.type == Scalar::f32 ? 4 : 2;
  const int64_t row = in.channels * in.height * in.width * bytes;
  STD_TORCH_CHECK(row % 4 == 0, "weight: expected an even number of inputs in bf16");
  weight = whole("weight", weight, weight.numel(), images);
  prefix = whole("prefix", prefix, first * dim, images);
  pos_embed = whole("pos_embed", pos_embed, tokens * dim, images);
  Held held;
  product.weight = weight.const_data_ptr();
  product.bias = parameter("bias", bias, dim, images, held);
  product.depth = row / 4;
  product.width = dim;
  Tensor out = torch::stable::new_empty(images, {batch, tokens, dim});
  if (batch == 0) return out;

  const ProductKernels& set = kernels().product;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t wanted = std::max((patches + kBand - 1) / kBand, (threads + batch - 1) / batch);
  const int64_t bands = std::max<int64_t>(1, std::min(wanted, patches));
  const int64_t most = (patches + bands - 1) / bands;
  product.rows = product.rows_per_sample = std::max<int64_t>(1, most);
  set.plan(product, 1);
  Buffer packed;
  if (batch >= kLeastImages) packed = pack(product);
  const size_t gathered = static_cast<size_t>((product.rows * row + 63) / 64 * 16);
  const size_t floats = set.workspace(product);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const char* pos = static_cast<const char*>(pos_embed.const_data_ptr());
  over_threads(batch * bands, 1, gathered + floats, [&](float* rows, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / bands, band = task % bands;
      const int64_t start = band * patches / bands, stop = (band + 1) * patches / bands;
      char* tokens_of = to + b * tokens * dim * bytes;
      if (band == 0) write_prefix(prefix, pos_embed, product.type, first * dim, tokens_of);
      if (start == stop) continue;
      gather(in, bytes, b, start, stop - start, reinterpret_cast<char*>(rows));
      ProductArgs own = product;
      own.x = rows;
      own.rows = own.rows_per_sample = stop - start;
      own.residual = pos + (first + start) * dim * bytes;
      own.out = tokens_of + (first + start) * dim * bytes;
      set.plan(own, 1);
      set.run(own, rows + gathered, 0, own.tasks);
    }
  });
  return out;
}

// The sum of dout [B, N, D] over images, of its first `tokens` tokens: [1, tokens, D].
Tensor sum_over_images(const Tensor& dout, int64_t tokens) {
  const int64_t dim = last(dout);
  Tensor sums = torch::stable::new_empty(dout, {1, tokens, dim});
  WeightGradientArgs args{};
  args.type = scalar_of("dout", dout);
  args.g = dout.const_data_ptr();
  args.ldg = dout.size(1) * dim;
  args.samples = 1;
  args.rows = dout.size(0);
  args.outputs = tokens * dim;
  args.dbias = sums.mutable_data_ptr();
  if (args.rows == 0) return torch::stable::zero_(sums);
  if (args.outputs > 0) run_weight_gradient(args);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_embed_bwd(
    Tensor dout, Optional images, Tensor weight, int64_t prefix_tokens,
    std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 4);
  STD_TORCH_CHECK(dout.dim() == 3 && weight.dim() == 4 && last(dout) == weight.size(0) &&
                      prefix_tokens >= 0 && prefix_tokens <= dout.size(1),
                  "dout: expected [B, N, D] with D the rows of weight");
  dout = contiguous("dout", dout, weight.scalar_type());
  const int64_t batch = dout.size(0), tokens = dout.size(1), dim = last(dout);
  Tensor dprefix = none(dout), dpos = none(dout);
  if (wants[3]) dpos = sum_over_images(dout, tokens);
  if (wants[2]) dprefix = sum_over_images(dout, prefix_tokens);
  if (!wants[0] && !wants[1]) return {none(dout), none(dout), dprefix, dpos};

  WeightGradientArgs args{};
  args.type = scalar_of("dout", dout);
  args.samples = batch;
  args.rows = tokens - prefix_tokens;
  args.ldg = args.outputs = dim;
  args.sample_ldg = tokens * dim;
  Images in{};
  if (wants[0]) {
    const Tensor& given = required("images", images);
    STD_TORCH_CHECK(given.scalar_type() == dout.scalar_type(), "images: expected dout's dtype");
    in = cut(given, weight);
    STD_TORCH_CHECK(given.size(0) == batch && in.patches == args.rows,
                    "images: expected those of dout");
    args.images = &in;
    args.inputs = weight.numel() / dim;
  }
  Tensor dweight = wants[0] ? torch::stable::new_empty(dout, weight.sizes()) : none(dout);
  Tensor dbias = wants[1] ? torch::stable::new_empty(dout, {dim}) : none(dout);
  if (batch * args.rows == 0) {
    return {torch::stable::zero_(dweight), torch::stable::zero_(dbias), dprefix, dpos};
  }
  args.g = static_cast<const char*>(dout.const_data_ptr()) +
           prefix_tokens * dim * (args.type == Scalar::f32 ? 4 : 2);
  args.dweight = wants[0] ? dweight.mutable_data_ptr() : nullptr;
  args.dbias = wants[1] ? dbias.mutable_data_ptr() : nullptr;
  run_weight_gradient(args);
  return {dweight, dbias, dprefix, dpos};
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&deit::patch_embed));
  m.impl("patch_embed_bwd", TORCH_BOX(&deit::patch_embed_bwd));
}
