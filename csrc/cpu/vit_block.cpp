// A whole block in inference on the CPU. Every thread goes image by image where the images give the
// threads even shares; else it goes operator by operator, each over all threads. Both compute the
// same bits.
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "launch_linear.h"

namespace deit {
namespace {

// Packing the weights once saves more than it costs from this many images on. From there on the
// packed weights also take less memory than the eager block's hidden layers would.
constexpr int64_t kLeastImages = 4;
// Bytes of a block's packed weights, which every image reads again: 1.8 MB in DeiT-Ti, 7.1 in
// DeiT-S. DeiT-B's 28 MB leave the last-level cache between two images: there it was 4 % slower
// than operator by operator.
constexpr int64_t kMostPacked = 16 << 20;

struct Layer {
  Tensor weight;
  Optional bias, gamma;
  std::vector<Tensor> others{};  // of a weight that lies in thirds
};

struct Norm {
  Tensor weight;
  Optional bias;
};

struct Block {
  Norm norms[2];
  Layer qkv, proj, fc1, fc2;
  Optional key_bias;
  int64_t heads;
  double scale, eps;
  Activation activation;
  std::optional<Positions> positions{};
};

bool image_by_image(const Block& block, const Tensor& x) {
  const int64_t images = x.size(0);
  const int64_t weights =
      4 * x.size(2) * x.size(2) + 2 * block.fc1.weight.size(0) * x.size(2);  // elements
  if (weights * (x.scalar_type() == ScalarType::Float ? 4 : 2) > kMostPacked) return false;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t turns = (images + threads - 1) / threads;
  return images >= kLeastImages && 8 * images >= 7 * turns * threads;
}

Tensor by_operator(const Block& block, const Tensor& x) {
  const auto& [norm1, norm2] = block.norms;
  const Tensor normed = layer_norm_of(x, norm1.weight, norm1.bias, block.eps, nullptr);
  const Tensor qkv = linear_of_thirds(normed, block.qkv.weight, block.qkv.others, block.qkv.bias);
  std::optional<Positions> positions = block.positions;
  const Tensor mixed = attention_of(qkv, block.heads, block.scale, block.key_bias, nullptr,
                                    positions ? &*positions : nullptr);
  const Tensor stream = linear_of(mixed, block.proj.weight, block.proj.bias, Activation::none, x,
                                  block.proj.gamma, std::nullopt);
  const Tensor second = layer_norm_of(stream, norm2.weight, norm2.bias, block.eps, nullptr);
  return gelu_mlp_of(second, block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias,
                     stream, block.fc2.gamma, std::nullopt, block.activation);
}

// What the images' kernel reads, and the tensors that its pointers point into.
class Description {
 public:
  Description(const Block& block, const Tensor& x)
      : x_(torch::stable::contiguous(x)), positions_(block.positions) {
    args.x = x_.const_data_ptr();
    const int64_t channels = x.size(2);
    for (int i = 0; i < 2; ++i) {
      LayerNormArgs& norm = args.norm[i];
      norm.channels = channels;
      norm.eps = static_cast<float>(block.eps);
      norm.weight = parameter("norm weight", block.norms[i].weight, channels, x, hold());
      norm.bias = parameter("norm bias", block.norms[i].bias, channels, x, hold());
    }
    AttentionArgs& attention = args.attention;
    attention.type = scalar_of("x", x);
    attention.batch = 1;
    attention.tokens = x.size(1);
    attention.heads = block.heads;
    attention.head_dim = channels / block.heads;
    attention.stride_token = 3 * channels;
    attention.scale = static_cast<float>(block.scale);
    attention.key_bias =
        parameter("key_bias", block.key_bias, x.size(0) * x.size(1), x, hold());
    if (positions_) attention.rope = rope_of(*positions_, x, block.heads, attention.head_dim);
    kernels().attention.plan(attention);
    describe(block.qkv, args.qkv);
    describe(block.proj, args.proj);
    describe(block.fc1, args.fc1);
    describe(block.fc2, args.fc2);
    args.fc1.activation = block.activation;
    pack();
  }
  BlockArgs args{};

 private:
  Held& hold() { return held_.at(count_++); }

  void describe(const Layer& layer, ProductArgs& product) {
    product.type = product.out_type = args.attention.type;
    Tensor& weight = hold().tensor = layer.weight;
    product.weight = matrix("weight", weight, x_.scalar_type());
    product.depth = weight.size(1) / (product.type == Scalar::bf16 ? 2 : 1);
    product.width = weight.size(0);
    if (!layer.others.empty()) add_thirds(product, layer.others, thirds_);
    product.rows = product.rows_per_sample = args.attention.tokens;
    product.bias = parameter("bias", layer.bias, product.width, x_, hold());
    product.gamma = parameter("gamma", layer.gamma, product.width, x_, hold());
    kernels().product.plan(product, 1);
  }

  void pack() {
    const ProductKernels& set = kernels().product;
    const std::array<ProductArgs*, 4> layers{&args.qkv, &args.proj, &args.fc1, &args.fc2};
    std::array<int64_t, 5> first{};  // panel of each layer
    size_t floats = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      first[i + 1] = first[i] + layers[i]->panels;
      floats += static_cast<size_t>(layers[i]->panels * set.panel * layers[i]->depth);
    }
    packed_ = allocate(floats);
    float* to = packed_.get();
    for (ProductArgs* layer : layers) {
      layer->packed = to;
      to += layer->panels * set.panel * layer->depth;
    }
    over_threads(first[4], 1, [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < layers.size(); ++i) {
        const int64_t from = std::max(begin, first[i]), until = std::min(end, first[i + 1]);
        if (from >= until) continue;
        set.pack(*layers[i], const_cast<float*>(layers[i]->packed), from - first[i],
                        until - first[i]);
      }
    });
  }

  Tensor x_;
  std::optional<Positions> positions_;
  std::vector<Held> held_ = std::vector<Held>(17);
  Tensor thirds_[2];
  size_t count_ = 0;
  Buffer packed_;
};

void check(const Block& block, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected [B, N, D]");
  const Scalar type = scalar_of("x", x);
  STD_TORCH_CHECK(type != Scalar::f16, "x: expected fp32 or bf16");
  const int64_t channels = x.size(2), hidden = block.fc1.weight.size(0);
  STD_TORCH_CHECK(block.heads > 0 && channels > 0 && channels % block.heads == 0,
                  "x: expected a last axis that is a multiple of num_heads=", block.heads);
  const int64_t word = type == Scalar::bf16 ? 2 : 1;
  STD_TORCH_CHECK(channels % word == 0 && hidden > 0 && hidden % word == 0,
                  "x and w1: expected even widths in bf16");
  const auto expect = [&](const char* name, const Tensor& weight, int64_t width, int64_t depth) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == width && weight.size(1) == depth, name,
                    ": expected [", width, ", ", depth, "]");
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), name, ": expected x's dtype");
  };
  expect("qkv_weight", block.qkv.weight, (block.qkv.others.empty() ? 3 : 1) * channels, channels);
  for (const Tensor& weight : block.qkv.others) expect("qkv_weight", weight, channels, channels);
  expect("proj_weight", block.proj.weight, channels, channels);
  expect("w1", block.fc1.weight, hidden, channels);
  expect("w2", block.fc2.weight, channels, hidden);
}

Tensor row_stats_of(const Tensor& y) {
  const int64_t channels = y.size(2), rows = y.size(0) * y.size(1);
  Tensor stats = torch::stable::new_empty(
      y, {y.size(0), y.size(1), 2, (channels + 63) / 64}, ScalarType::Float);
  over_threads(
      rows, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
        kernels().block.row_stats(y.const_data_ptr(), scalar_of("y", y), channels,
                            static_cast<float*>(stats.mutable_data_ptr()), begin, end);
      });
  return stats;
}

std::tuple<Tensor, Tensor> run(const Block& block, const Tensor& x) {
  check(block, x);
  if (x.numel() == 0 || !image_by_image(block, x)) {
    const Tensor y = by_operator(block, x);
    return {y, row_stats_of(y)};
  }
  Description description(block, x);
  BlockArgs& args = description.args;
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor stats = torch::stable::new_empty(
      x, {x.size(0), x.size(1), 2, (x.size(2) + 63) / 64}, ScalarType::Float);
  args.out = y.mutable_data_ptr();
  args.row_stats = static_cast<float*>(stats.mutable_data_ptr());
  const BlockKernels& set = kernels().block;
  over_threads(x.size(0), 1, set.workspace(args),
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.run(args, workspace, begin, end);
               });
  return {y, stats};
}

std::tuple<Tensor, Tensor> vit_block(
    Tensor x, Optional, Tensor norm1_weight, Optional norm1_bias, Tensor qkv_weight,
    Optional qkv_bias, Tensor proj_weight, Optional proj_bias, Optional gamma1,
    Tensor norm2_weight, Optional norm2_bias, Tensor w1, Optional b1, Tensor w2, Optional b2,
    Optional gamma2, Optional key_bias, int64_t num_heads, double scale, double eps,
    std::optional<std::string> activation) {
  return run({{{norm1_weight, norm1_bias}, {norm2_weight, norm2_bias}},
              {qkv_weight, qkv_bias, std::nullopt},
              {proj_weight, proj_bias, gamma1},
              {w1, b1, std::nullopt},
              {w2, b2, gamma2},
              key_bias,
              num_heads,
              scale,
              eps,
              activation_of_mlp(activation)},
             x);
}

std::tuple<Tensor, Tensor> vit_block_thirds(
    Tensor x, Tensor norm1_weight, Optional norm1_bias, Tensor q_weight, Tensor k_weight,
    Tensor v_weight, Optional qkv_bias, Tensor proj_weight, Optional proj_bias, Optional gamma1,
    Tensor norm2_weight, Optional norm2_bias, Tensor w1, Optional b1, Tensor w2, Optional b2,
    Optional gamma2, Optional key_bias, int64_t num_heads, double scale, double eps,
    std::optional<std::string> activation) {
  return run({{{norm1_weight, norm1_bias}, {norm2_weight, norm2_bias}},
              {q_weight, qkv_bias, std::nullopt, {k_weight, v_weight}},
              {proj_weight, proj_bias, gamma1},
              {w1, b1, std::nullopt},
              {w2, b2, gamma2},
              key_bias,
              num_heads,
              scale,
              eps,
              activation_of_mlp(activation)},
             x);
}

// With rotary positions; k_weight and v_weight are there where the weight lies in thirds.
std::tuple<Tensor, Tensor> vit_block_rotary(
    Tensor x, Tensor norm1_weight, Optional norm1_bias, Tensor q_weight, Optional k_weight,
    Optional v_weight, Optional qkv_bias, Tensor proj_weight, Optional proj_bias, Optional gamma1,
    Tensor norm2_weight, Optional norm2_bias, Tensor w1, Optional b1, Tensor w2, Optional b2,
    Optional gamma2, Tensor sin, Tensor cos, int64_t prefix, bool interleaved, int64_t num_heads,
    double scale, double eps, std::optional<std::string> activation) {
  Layer qkv{q_weight, qkv_bias, std::nullopt};
  if (k_weight.has_value() && v_weight.has_value()) qkv.others = {*k_weight, *v_weight};
  return run({{{norm1_weight, norm1_bias}, {norm2_weight, norm2_bias}},
              qkv,
              {proj_weight, proj_bias, gamma1},
              {w1, b1, std::nullopt},
              {w2, b2, gamma2},
              std::nullopt,
              num_heads,
              scale,
              eps,
              activation_of_mlp(activation),
              Positions{sin, cos, prefix, interleaved}},
             x);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("vit_block", TORCH_BOX(&deit::vit_block));
  m.impl("vit_block_thirds", TORCH_BOX(&deit::vit_block_thirds));
  m.impl("vit_block_rotary", TORCH_BOX(&deit::vit_block_rotary));
}
