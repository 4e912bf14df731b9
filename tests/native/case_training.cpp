// What ops_training.cpp launches: the gradients of attention and of LayerNorm.
#include "cases.h"
#include "fence.h"

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
  args.head_dim = tiled ? random.size(40) : random.chance(0.3) ? 64 : random.size(80);
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
  set.training.plan_attention_gradient(args);
  run(args.batch * args.heads, set.training.attention_gradient_workspace(args), {&dqkv}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.training.attention_gradient(args, workspace, begin, end);
      });

  for (int64_t task = 0; task < args.batch * args.heads; ++task) {
    const int64_t b = task / args.heads, column = task % args.heads * args.head_dim;
    const auto of = [&](Strided& from, int64_t which) {
      return slice(from, b, args.tokens, which * channels + column, args.head_dim);
    };
    Head head{args.tokens, args.head_dim, of(qkv, 0), of(qkv, 1), of(qkv, 2), of(dout, 0), {}, {}};
    for (int64_t n = 0; n < args.tokens; ++n) head.bias.push_back(bias.at(b * args.tokens + n, 0));
    head.differentiate(static_cast<double>(args.scale));
    for (int64_t i = 0; i < args.tokens * 3 * args.head_dim; ++i) {
      const int64_t n = i / args.head_dim, c = i % args.head_dim;  // n: of [N, 3]
      const int64_t index = (b * args.tokens * 3 + n) * channels + column + c;
      near("dqkv", index, dqkv.at(index), head.dqkv[static_cast<size_t>(i)], args.type);
    }
  }
}

void fuzz_layer_norm_gradient(Random& random, const deit::Kernels& set) {
  std::vector<int64_t> sizes;
  for (int64_t d = random.between(0, deit::kMaxLeadingDims); d > 0; --d) {
    sizes.push_back(random.between(1, 4));
  }
  if (sizes.size() == 2) sizes[1] = random.size(70);  // several chunks of rows
  const int64_t width = random.chance(0.05) ? random.size(2100) : random.size(140);
  const bool add = random.chance(0.6);
  deit::LayerNormGradientArgs args{};
  args.x_type = random.type();
  args.total_type = add && random.chance(0.5) ? deit::Scalar::f32 : args.x_type;
  Strided dout(sizes, width, args.x_type, random), x(sizes, width, args.x_type, random);
  Strided total(sizes, width, args.total_type, random);
  Strided dtotal(sizes, width, args.total_type, random);
  const int64_t rows = total.count, samples = sizes.empty() ? 1 : sizes[0];
  const int64_t chunks = (rows + deit::kRowChunk - 1) / deit::kRowChunk;
  // Any statistics will do: the kernel takes the mean's error off, and rstd is but a factor.
  Parameter weight(width, 1.0, random), mean(rows, 1.0, random), rstd(rows, 1.0, random);
  for (int64_t row = 0; row < rows; ++row) rstd.data[row] = std::abs(rstd.data[row]) / 4.0f;
  Parameter gamma(width, add ? 0.5 : 0.0, random), keep(samples, add ? 0.5 : 0.0, random);
  args.dweight = random.chance(0.8), args.dbias = random.chance(0.8);
  args.dgamma = gamma.data && random.chance(0.8);
  const bool has_sums = args.dweight || args.dbias || args.dgamma;
  const bool has_dx = add && random.chance(0.8), has_dresidual = random.chance(0.8);
  Elements dx(has_dx ? rows * width : 0, args.x_type, random);
  Elements dresidual(has_dresidual ? rows * width : 0, args.total_type, random);
  Elements sums(has_sums ? chunks * 6 * width : 0, deit::Scalar::f32, random);
  args.dout = dout.rows, args.total = total.rows;
  if (args.dgamma) args.x = x.rows;
  if (add) args.dtotal = dtotal.rows;
  if (has_dx) args.dx = dx.memory.data();
  args.weight = weight.data, args.mean = mean.data, args.rstd = rstd.data;
  args.gamma = gamma.data, args.keep = keep.data;
  if (has_dresidual) args.dresidual = dresidual.memory.data();
  if (has_sums) args.sums = sums.memory.floats();
  args.rows = rows, args.channels = width, args.rows_per_sample = rows / samples;
  run(chunks, 0, {&dx, &dresidual, &sums}, random, [&](float*, int64_t begin, int64_t end) {
    set.training.layer_norm_gradient(args, begin, end);
  });

  std::vector<double> expected(static_cast<size_t>(chunks * 3 * width));
  std::vector<double> xhat(static_cast<size_t>(width));
  const double share = 1.0 / static_cast<double>(width);
  for (int64_t row = 0; row < rows; ++row) {
    double* of_weight = expected.data() + row / deit::kRowChunk * 3 * width;
    double average = 0.0, plain = 0.0, along = 0.0;
    for (int64_t i = 0; i < width; ++i) average += total.at(row, i) * share;
    for (int64_t i = 0; i < width; ++i) {
      double& value = xhat[static_cast<size_t>(i)];
      value = (total.at(row, i) - average) * rstd.at(row, 1.0);
      const double dy = dout.at(row, i), wdy = dy * weight.at(i, 1.0);
      plain += wdy * share;
      along += wdy * value * share;
      if (args.dweight) of_weight[i] += dy * value;
      if (args.dbias) of_weight[width + i] += dy;
    }
    for (int64_t i = 0; i < width; ++i) {
      const double wdy = dout.at(row, i) * weight.at(i, 1.0);
      double g = rstd.at(row, 1.0) * (wdy - plain - xhat[static_cast<size_t>(i)] * along);
      if (add) g += dtotal.at(row, i);
      const int64_t at = row * width + i;
      if (has_dresidual) near("dresidual", at, dresidual.at(at), g, args.total_type);
      g *= keep.at(row / args.rows_per_sample, 1.0);
      if (has_dx) near("dx", at, dx.at(at), g * gamma.at(i, 1.0), args.x_type);
      if (args.dgamma) of_weight[2 * width + i] += g * x.at(row, i);
    }
  }
  for (int64_t i = 0; has_sums && i < chunks * 3 * width; ++i) {  // [chunks, 2, 3, D], high and low
    const int64_t high = i + i / (3 * width) * 3 * width;
    near("sums", i, sums.at(high) + sums.at(high + 3 * width), expected[static_cast<size_t>(i)],
         deit::Scalar::f32);
  }
}

}  // namespace fuzz
