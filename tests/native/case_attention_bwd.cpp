// The gradient of attention, with rotary positions or without.
#include "cases.h"
#include "fence.h"
#include "tables.h"

namespace fuzz {
namespace {

// One head of one image in double: what dqkv must hold, [N, 3, d].
struct Head {
  int64_t tokens, dim;
  std::vector<double> q, k, v, dout, bias, dqkv;

  double dot(const std::vector<double>& a, int64_t i, const std::vector<double>& b, int64_t j) {
    double total = 0.0;
    const double *left = a.data() + i * dim, *right = b.data() + j * dim;
    for (int64_t c = 0; c < dim; ++c) total += left[c] * right[c];
    return total;
  }

  std::vector<double> probabilities(int64_t query, double scale) {
    std::vector<double> p(bias);
    double largest = -INFINITY, total = 0.0;
    for (int64_t key = 0; key < tokens; ++key) {
      double& score = p[static_cast<size_t>(key)];
      score += dot(q, query, k, key) * scale;
      largest = std::max(largest, score);
    }
    for (double& each : p) total += each = largest == -INFINITY ? 0.0 : std::exp(each - largest);
    for (double& each : p) each = total > 0.0 ? each / total : 0.0;
    return p;
  }

  void differentiate(double scale) {
    dqkv.assign(static_cast<size_t>(tokens * 3 * dim), 0.0);
    for (int64_t query = 0; query < tokens; ++query) {
      const std::vector<double> p = probabilities(query, scale);
      std::vector<double> dp(p.size());
      double delta = 0.0;
      for (size_t key = 0; key < p.size(); ++key) {
        dp[key] = dot(dout, query, v, static_cast<int64_t>(key));
        delta += p[key] * dp[key];
      }
      double* of_query = dqkv.data() + query * 3 * dim;
      for (size_t key = 0; key < p.size(); ++key) {
        const double ds = p[key] * (dp[key] - delta) * scale;
        const int64_t row = static_cast<int64_t>(key) * dim;
        double* of_key = dqkv.data() + row * 3;
        for (int64_t c = 0; c < dim; ++c) {
          of_query[c] += ds * k[static_cast<size_t>(row + c)];
          of_key[dim + c] += ds * q[static_cast<size_t>(query * dim + c)];
          of_key[2 * dim + c] += p[key] * dout[static_cast<size_t>(query * dim + c)];
        }
      }
    }
  }
};

// [N, d] of a [B, N, ...] from `column` on.
std::vector<double> slice(Strided& rows, int64_t batch, int64_t tokens, int64_t column,
                          int64_t dim) {
  std::vector<double> all;
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t c = 0; c < dim; ++c) all.push_back(rows.at(batch * tokens + n, column + c));
  }
  return all;
}

}  // namespace

void fuzz_attention_gradient(Random& random, const deit::Kernels& set) {
  deit::AttentionGradientArgs args{};
  const bool tiled = random.chance(0.2);  // from 97 tokens on there are several tiles of queries
  args.type = random.type();
  args.batch = tiled ? 1 : random.between(1, 3);
  args.heads = random.between(1, 3);
  args.tokens = tiled ? random.between(97, 220) : random.size(70);
  args.head_dim = random.chance(0.3) ? (tiled ? 32 : 64) : random.size(tiled ? 40 : 80);
  const bool turned = random.chance(0.4);
  if (turned) args.head_dim = (args.head_dim + 1) / 2 * 2;
  args.scale = 0.25f / std::sqrt(static_cast<float>(args.head_dim));
  const int64_t channels = args.heads * args.head_dim, rows = args.batch * args.tokens;
  Strided qkv({args.batch, args.tokens}, 3 * channels, args.type, random);
  Strided dout({args.batch, args.tokens}, channels, args.type, random);
  Parameter bias(rows, 0.4, random);
  for (int64_t i = 0; bias.data && i < rows; ++i) {
    if (random.chance(0.2)) bias.data[i] = -INFINITY;
  }
  Elements dqkv(rows * 3 * channels, args.type, random);
  args.qkv = qkv.rows.data, args.dout = dout.rows.data, args.dqkv = dqkv.memory.data();
  args.stride_batch = qkv.rows.strides[0], args.stride_token = qkv.rows.strides[1];
  args.dout_stride_batch = dout.rows.strides[0], args.dout_stride_token = dout.rows.strides[1];
  args.key_bias = bias.data;
  Tables tables(turned, args.tokens, args.heads, args.head_dim, random);
  args.rope = tables.rope;
  set.attention.plan_gradient(args);
  run(args.batch * args.heads, set.attention.gradient_workspace(args), {&dqkv}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.attention.gradient(args, workspace, begin, end);
      });

  for (int64_t task = 0; task < args.batch * args.heads; ++task) {
    const int64_t b = task / args.heads, column = task % args.heads * args.head_dim;
    const auto of = [&](Strided& from, int64_t which) {
      return slice(from, b, args.tokens, which * channels + column, args.head_dim);
    };
    Head head{args.tokens, args.head_dim, of(qkv, 0), of(qkv, 1), of(qkv, 2), of(dout, 0), {}, {}};
    for (int64_t n = 0; n < args.tokens; ++n) head.bias.push_back(bias.at(b * args.tokens + n, 0));
    const int64_t h = task % args.heads, d = args.head_dim;
    for (std::vector<double>* x : {&head.q, &head.k}) {
      const std::vector<double> before = *x;
      for (int64_t i = 0; i < args.tokens * d; ++i) {
        const double* row = before.data() + i / d * d;
        (*x)[static_cast<size_t>(i)] =
            tables.turned(h, i / d, i % d, [&](int64_t c) { return row[c]; });
      }
    }
    head.differentiate(static_cast<double>(args.scale));
    for (int64_t n = 0; n < args.tokens * 2; ++n) {  // dq and dk of every token
      double* row = head.dqkv.data() + (n / 2 * 3 + n % 2) * d;
      const std::vector<double> before(row, row + d);
      for (int64_t i = 0; i < d; ++i) {
        row[i] = tables.turned_back(h, n / 2, i, before);
      }
    }
    for (int64_t i = 0; i < args.tokens * 3 * args.head_dim; ++i) {
      const int64_t n = i / args.head_dim, c = i % args.head_dim;  // n: of [N, 3]
      const int64_t index = (b * args.tokens * 3 + n) * channels + column + c;
      near("dqkv", index, dqkv.at(index), head.dqkv[static_cast<size_t>(i)], args.type);
    }
  }
}

}  // namespace fuzz
