// A whole block in inference with its products in 8-bit integers. Every thread goes image by image
// where the images give the threads even shares; else all images go at once, operator by operator.
// Both compute the same bits.
#include <algorithm>
#include <optional>
#include <vector>

#include "int8_launch.h"

namespace deit {
namespace {

// What the kernels read, for one image or for all; pointers into activations are set per range.
struct Int8Block {
  Int8Args qkv, proj, mlp;
  AttentionArgs attention;
  int64_t channels;
};

Rows rows_at(const float* data, int64_t rows, int64_t channels) {
  return {data, 1, {rows}, {channels}};
}

// Pieces of a thread's memory, or of the call's: [rows, 3 * channels] and [rows, channels].
struct Activations {
  float* qkv;
  float* mixed;
};

// The four operators on `images` images from the first one on, each by `product` and `attend`.
template <class Product, class Attend>
void advance(const Int8Block& block, const float* x, float* y, int64_t first, int64_t images,
             Activations between, const Product& product, const Attend& attend) {
  const int64_t tokens = block.attention.tokens, channels = block.channels;
  const int64_t rows = images * tokens, start = first * tokens * channels;
  const Rows stream = rows_at(x + start, rows, channels), sum = rows_at(y + start, rows, channels);
  const auto run = [&](Int8Args args, const Rows& in, const Rows& residual, float* out) {
    args.x = in;
    args.residual = residual;
    args.out = out;
    args.rows = rows;
    product(args);
  };
  run(block.qkv, stream, Rows{}, between.qkv);
  AttentionArgs attention = block.attention;
  attention.qkv = between.qkv;
  attention.out = between.mixed;
  attention.batch = images;
  if (attention.key_bias) attention.key_bias += first * tokens;
  attend(attention);
  run(block.proj, rows_at(between.mixed, rows, channels), stream, y + start);
  run(block.mlp, sum, sum, y + start);  // a pass reads its rows before it writes them
}

// Whole cache lines: a workspace begins behind them.
size_t between_floats(const Int8Block& block, int64_t images) {
  return static_cast<size_t>((images * block.attention.tokens * block.channels * 4 + 15) / 16 * 16);
}

Activations between_in(float* qkv, const Int8Block& block, int64_t images) {
  return {qkv, qkv + images * block.attention.tokens * block.channels * 3};
}

void all_at_once(const Int8Block& block, const float* x, float* y, int64_t images) {
  const Buffer memory = allocate(between_floats(block, images));
  advance(block, x, y, 0, images, between_in(memory.get(), block, images), run_int8, run_attention);
}

// One image after another. What lies between x and y stays in the thread's second-level cache and
// in memory that the thread uses again; for a whole batch it would be fresh pages in every block.
void image_by_image(const Int8Block& block, const float* x, float* y, int64_t images) {
  const Int8Kernels& eights = int8_kernels();
  const AttentionKernels& floats = kernels().attention;
  AttentionArgs planned = block.attention;
  floats.plan(planned);
  const size_t attention = floats.workspace(planned), between = between_floats(block, 1);
  const size_t product_floats = floats_of(std::max(
      {eights.workspace(block.qkv), eights.workspace(block.mlp), eights.workspace(block.proj)}));
  const auto run = [&](float* memory, int64_t begin, int64_t end) {
    float* const workspace = memory + between;
    const auto product = [&](const Int8Args& args) {
      eights.run(args, workspace, 0, (args.rows + eights.group - 1) / eights.group);
    };
    const auto attend = [&](AttentionArgs args) {
      args.query_tile = planned.query_tile;
      args.tiles = planned.tiles;
      floats.forward(args, workspace, 0, args.heads * args.tiles);
    };
    for (int64_t image = begin; image < end; ++image) {
      advance(block, x, y, image, 1, between_in(memory, block, 1), product, attend);
    }
  };
  over_threads(images, 1, between + std::max(product_floats, attention), run);
}

bool even_shares(int64_t images) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t turns = (images + threads - 1) / threads;
  return 8 * images >= 7 * turns * threads;
}

struct Norm {
  Tensor held[2];
  Norm(Int8Args& args, const Tensor& x, const Tensor& weight, const Optional& bias, double eps) {
    args.norm.channels = x.size(x.dim() - 1);
    args.norm.eps = static_cast<float>(eps);
    args.norm.weight = fp32_vector("norm weight", weight, args.norm.channels, x, held[0]);
    args.norm.bias = fp32_vector("norm bias", bias, args.norm.channels, x, held[1]);
  }
};

Tensor int8_vit_block(Tensor x, Tensor norm1_weight, Optional norm1_bias, Tensor qkv,
                      Tensor qkv_scales, Tensor qkv_sums, Optional qkv_bias, Tensor proj,
                      Tensor proj_scales, Tensor proj_sums, Optional proj_bias, Optional gamma1,
                      Tensor norm2_weight, Optional norm2_bias, Tensor w1, Tensor w1_scales,
                      Tensor w1_sums, Optional b1, Tensor w2, Tensor w2_scales, Tensor w2_sums,
                      Optional b2, Optional gamma2, Optional key_bias, int64_t num_heads,
                      double scale, double eps) {
  STD_TORCH_CHECK(x.dim() == 3 && x.scalar_type() == ScalarType::Float,
                  "x: expected fp32 [B, N, D]");
  const int64_t images = x.size(0), tokens = x.size(1), channels = x.size(2);
  STD_TORCH_CHECK(num_heads > 0 && channels > 0 && channels % num_heads == 0,
                  "x: expected a last axis that is a multiple of num_heads=", num_heads);
  const auto expect = [](const char* name, const Tensor& scales, int64_t features) {
    STD_TORCH_CHECK(scales.numel() == features, name, ": expected ", features,
                    " output channels; got ", scales.numel());
  };
  expect("qkv", qkv_scales, 3 * channels);
  expect("proj", proj_scales, channels);
  expect("w2", w2_scales, channels);
  Int8Block block{};
  block.channels = channels;
  Buffer columns[4];
  block.qkv.first =
      weight_of(x, channels, qkv, qkv_scales, qkv_sums, qkv_bias, std::nullopt, columns[0]);
  block.proj.first =
      weight_of(x, channels, proj, proj_scales, proj_sums, proj_bias, gamma1, columns[1]);
  block.mlp.first =
      weight_of(x, channels, w1, w1_scales, w1_sums, b1, std::nullopt, columns[2]);
  block.mlp.second = weight_of(x, block.mlp.first.features, w2, w2_scales, w2_sums, b2, gamma2,
                               columns[3]);
  const Norm first(block.qkv, x, norm1_weight, norm1_bias, eps);
  const Norm second(block.mlp, x, norm2_weight, norm2_bias, eps);
  Held bias_held;
  AttentionArgs& attention = block.attention;
  attention.type = Scalar::f32;
  attention.bf16_products = true;
  attention.batch = 1;
  attention.tokens = tokens;
  attention.heads = num_heads;
  attention.head_dim = channels / num_heads;
  attention.stride_token = 3 * channels;
  attention.stride_batch = tokens * attention.stride_token;
  attention.scale = static_cast<float>(scale);
  attention.key_bias = parameter("key_bias", key_bias, images * tokens, x, bias_held);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (out.numel() == 0) return out;
  const Tensor in = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const float* from = static_cast<const float*>(in.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  if (!even_shares(images)) {
    all_at_once(block, from, to, images);
    return out;
  }
  image_by_image(block, from, to, images);
  return out;
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("int8_vit_block_packed", TORCH_BOX(&deit::int8_vit_block));
}
