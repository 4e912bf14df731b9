// attention: padded rows, tokens before images, masked keys, products in bf16, rotary positions.
#include "cases.h"
#include "fence.h"
#include "tables.h"

namespace fuzz {

void fuzz_attention(Random& random, const deit::Kernels& set) {
  deit::AttentionArgs args{};
  args.type = random.type();
  args.batch = random.between(1, 3);
  args.heads = random.between(1, 3);
  args.tokens = random.chance(0.1) ? random.size(300) : random.size(70);
  args.head_dim = random.chance(0.3) ? 64 : random.size(80);
  const bool turned = random.chance(0.4);
  if (turned) args.head_dim = (args.head_dim + 1) / 2 * 2;
  args.bf16_products = args.type == deit::Scalar::f32 && random.chance(0.5);
  args.scale = 0.25f / std::sqrt(static_cast<float>(args.head_dim));
  const int64_t channels = args.heads * args.head_dim, gap = random.size(20) - 1;
  const bool tokens_first = random.chance(0.3);  // [N, B, 3 D] seen as [B, N, 3 D]
  args.stride_token = (3 * channels + gap) * (tokens_first ? args.batch : 1);
  args.stride_batch = (3 * channels + gap) * (tokens_first ? 1 : args.tokens);
  const int64_t span = (args.batch - 1) * args.stride_batch +
                       (args.tokens - 1) * args.stride_token + 3 * channels;
  Elements qkv(span, args.type, random);
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t n = 0; n < args.tokens; ++n) {
      const int64_t row = b * args.stride_batch + n * args.stride_token;
      for (int64_t i = 0; i < 3 * channels; ++i) qkv.randomise(row + i, random);
    }
  }
  Parameter bias(args.batch * args.tokens, 0.4, random);
  for (int64_t i = 0; bias.data && i < args.batch * args.tokens; ++i) {
    if (random.chance(0.2)) bias.data[i] = -INFINITY;
  }
  Elements out(args.batch * args.tokens * channels, args.type, random);
  args.qkv = qkv.memory.data();
  args.out = out.memory.data();
  args.key_bias = bias.data;
  Tables tables(turned, args.tokens, args.heads, args.head_dim, random);
  args.rope = tables.rope;
  set.attention.plan(args);
  run(args.batch * args.heads * args.tiles, set.attention.workspace(args), {&out}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.attention.forward(args, workspace, begin, end);
      });

  const bool coarse = args.bf16_products && !args.rope.sin;
  const deit::Scalar rounded = coarse ? deit::Scalar::bf16 : args.type;
  const std::vector<double> values = qkv.values();
  std::vector<double> p(static_cast<size_t>(args.tokens));
  for (int64_t task = 0; task < args.batch * args.heads * args.tokens; ++task) {
    const int64_t b = task / (args.heads * args.tokens), h = task / args.tokens % args.heads;
    const int64_t query = task % args.tokens;
    const auto at = [&](int64_t token, int64_t which, int64_t i) {
      return values[static_cast<size_t>(b * args.stride_batch + token * args.stride_token +
                                        which * channels + h * args.head_dim + i)];
    };
    double largest = -INFINITY, total = 0.0;
    for (int64_t key = 0; key < args.tokens; ++key) {
      double score = bias.at(b * args.tokens + key, 0.0);
      for (int64_t i = 0; i < args.head_dim; ++i) {
        const double q = tables.turned(h, query, i, [&](int64_t c) { return at(query, 0, c); });
        const double k = tables.turned(h, key, i, [&](int64_t c) { return at(key, 1, c); });
        score += q * k * static_cast<double>(args.scale);
      }
      p[static_cast<size_t>(key)] = score;
      largest = std::max(largest, score);
    }
    for (double& each : p) total += each = largest == -INFINITY ? 0.0 : std::exp(each - largest);
    for (int64_t i = 0; i < args.head_dim; ++i) {
      double y = 0.0;
      for (int64_t key = 0; key < args.tokens; ++key) y += p[static_cast<size_t>(key)] * at(key, 2, i);
      const int64_t index = (b * args.tokens + query) * channels + h * args.head_dim + i;
      near("out", index, out.at(index), total > 0.0 ? y / total : 0.0, rounded);
    }
  }
}

}  // namespace fuzz
