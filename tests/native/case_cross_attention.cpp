// cross_attention: padded rows, tokens before images.
#include "cases.h"
#include "fence.h"

namespace fuzz {
namespace {

// [B, tokens, channels] with gaps between rows, images first or tokens first.
struct Sequence {
  Sequence(int64_t batch, int64_t tokens, int64_t channels, deit::Scalar type, Random& random)
      : gap(random.size(20) - 1), tokens_first(random.chance(0.3)),
        stride_token((channels + gap) * (tokens_first ? batch : 1)),
        stride_batch((channels + gap) * (tokens_first ? 1 : tokens)),
        elements((batch - 1) * stride_batch + (tokens - 1) * stride_token + channels, type, random) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t n = 0; n < tokens; ++n) {
        const int64_t row = b * stride_batch + n * stride_token;
        for (int64_t i = 0; i < channels; ++i) elements.randomise(row + i, random);
      }
    }
    values = elements.values();
  }
  double at(int64_t b, int64_t n, int64_t i) const {
    return values[static_cast<size_t>(b * stride_batch + n * stride_token + i)];
  }

  int64_t gap;
  bool tokens_first;
  int64_t stride_token, stride_batch;
  Elements elements;
  std::vector<double> values;
};

}  // namespace

void fuzz_cross_attention(Random& random, const deit::Kernels& set) {
  deit::CrossAttentionArgs args{};
  args.type = random.type();
  args.batch = random.between(1, 3);
  args.heads = random.between(1, 3);
  args.queries = random.between(1, 4);
  args.tokens = random.chance(0.1) ? random.size(300) : random.size(70);
  args.head_dim = random.chance(0.3) ? 64 : random.size(80);
  args.scale = 0.25f / std::sqrt(static_cast<float>(args.head_dim));
  const int64_t channels = args.heads * args.head_dim;
  Sequence q(args.batch, args.queries, channels, args.type, random);
  Sequence kv(args.batch, args.tokens, 2 * channels, args.type, random);
  Elements out(args.batch * args.queries * channels, args.type, random);
  args.q = q.elements.memory.data();
  args.kv = kv.elements.memory.data();
  args.out = out.memory.data();
  args.q_stride_batch = q.stride_batch;
  args.q_stride_token = q.stride_token;
  args.kv_stride_batch = kv.stride_batch;
  args.kv_stride_token = kv.stride_token;
  run(args.batch * args.heads * args.queries, set.cross_attention.workspace(args), {&out}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.cross_attention.forward(args, workspace, begin, end);
      });

  std::vector<double> p(static_cast<size_t>(args.tokens));
  for (int64_t task = 0; task < args.batch * args.heads * args.queries; ++task) {
    const int64_t b = task / (args.heads * args.queries), h = task / args.queries % args.heads;
    const int64_t query = task % args.queries, head = h * args.head_dim;
    double largest = -INFINITY, total = 0.0;
    for (int64_t key = 0; key < args.tokens; ++key) {
      double score = 0.0;
      for (int64_t i = 0; i < args.head_dim; ++i) {
        score += q.at(b, query, head + i) * kv.at(b, key, head + i) *
                 static_cast<double>(args.scale);
      }
      p[static_cast<size_t>(key)] = score;
      largest = std::max(largest, score);
    }
    for (double& each : p) total += each = std::exp(each - largest);
    for (int64_t i = 0; i < args.head_dim; ++i) {
      double y = 0.0;
      for (int64_t key = 0; key < args.tokens; ++key) {
        y += p[static_cast<size_t>(key)] * kv.at(b, key, channels + head + i);
      }
      const int64_t index = (b * args.queries + query) * channels + head + i;
      near("out", index, out.at(index), y / total, args.type);
    }
  }
}

}  // namespace fuzz
