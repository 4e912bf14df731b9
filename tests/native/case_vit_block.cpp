// A whole block of one image after another on packed weights, and the statistics of its rows;
// with rotary positions or without.
#include "cases.h"
#include "fence.h"
#include "linear.h"
#include "tables.h"

namespace fuzz {

namespace {

using Values = std::vector<double>;

// A linear layer [width, inputs] of small numbers, packed by the set's own kernel.
struct Layer {
  Layer(int64_t width, int64_t inputs, bool scaled, const deit::BlockArgs& block, Random& random,
        const deit::Kernels& set, deit::ProductArgs& args)
      : width(width), inputs(inputs), weight(width * inputs, block.attention.type, random),
        bias(width, 0.7, random), gamma(scaled ? width : 0, scaled ? 0.5 : 0.0, random) {
    for (int64_t i = 0; i < width * inputs; ++i) {
      weight.set(i, static_cast<float>(random.between(-4, 4)) / 64.0f);
    }
    args.type = args.out_type = block.attention.type;
    args.rows = args.rows_per_sample = block.attention.tokens;
    args.width = width;
    args.depth = inputs / (args.type == deit::Scalar::bf16 ? 2 : 1);
    args.weight = weight.memory.data();
    args.bias = bias.data, args.gamma = gamma.data;
    set.product.plan(args, 1);
    packed = std::make_unique<Fenced>(
        static_cast<size_t>(args.panels * set.product.panel * args.depth) * sizeof(float), random, 4);
    for (int64_t panel = args.panels; panel-- > 0;) {  // backwards: none may touch another
      set.product.pack(args, packed->floats(), panel, panel + 1);
    }
    args.packed = packed->floats();
    args.weight = nullptr;
    values = weight.values();
  }

  Values operator()(const Values& x, int64_t rows) {
    Values y(static_cast<size_t>(rows * width));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t n = 0; n < width; ++n) {
        double sum = bias.at(n, 0.0);
        for (int64_t k = 0; k < inputs; ++k) {
          sum += x[static_cast<size_t>(row * inputs + k)] *
                 values[static_cast<size_t>(n * inputs + k)];
        }
        y[static_cast<size_t>(row * width + n)] = sum * gamma.at(n, 1.0);
      }
    }
    return y;
  }

  int64_t width, inputs;
  Elements weight;
  Parameter bias, gamma;
  std::unique_ptr<Fenced> packed;
  Values values;
};

struct Norm {
  Norm(int64_t channels, Random& random, deit::LayerNormArgs& args)
      : channels(channels), weight(channels, 1.0, random), bias(channels, 0.5, random) {
    args.weight = weight.data, args.bias = bias.data;
    args.channels = channels;
    args.eps = 1e-3f;
  }

  Values operator()(const Values& x) {
    Values y(x.size());
    for (size_t at = 0; at < x.size(); at += static_cast<size_t>(channels)) {
      double mean = 0.0, square = 0.0;
      for (int64_t i = 0; i < channels; ++i) mean += x[at + static_cast<size_t>(i)];
      mean /= static_cast<double>(channels);
      for (int64_t i = 0; i < channels; ++i) {
        square += std::pow(x[at + static_cast<size_t>(i)] - mean, 2);
      }
      const double rstd = 1.0 / std::sqrt(square / static_cast<double>(channels) + 1e-3);
      for (int64_t i = 0; i < channels; ++i) {
        y[at + static_cast<size_t>(i)] =
            (x[at + static_cast<size_t>(i)] - mean) * rstd * weight.at(i, 1.0) + bias.at(i, 0.0);
      }
    }
    return y;
  }

  int64_t channels;
  Parameter weight, bias;
};

Values attend(const Values& qkv, const deit::AttentionArgs& args, Parameter& bias,
              const Tables& tables, int64_t first_token) {
  const int64_t dim = args.head_dim, channels = args.heads * dim;
  Values out(static_cast<size_t>(args.tokens * channels)), p(static_cast<size_t>(args.tokens));
  const auto at = [&](int64_t token, int64_t column) {
    return qkv[static_cast<size_t>(token * 3 * channels + column)];
  };
  for (int64_t task = 0; task < args.heads * args.tokens; ++task) {
    const int64_t h = task / args.tokens * dim, query = task % args.tokens;
    double total = 0.0, most = -INFINITY;
    for (int64_t key = 0; key < args.tokens; ++key) {
      double score = bias.at(first_token + key, 0.0);
      for (int64_t i = 0; i < dim; ++i) {
        const auto q = [&](int64_t c) { return at(query, h + c); };
        const auto k = [&](int64_t c) { return at(key, channels + h + c); };
        score += tables.turned(h / dim, query, i, q) * tables.turned(h / dim, key, i, k) *
                 static_cast<double>(args.scale);
      }
      most = std::max(most, p[static_cast<size_t>(key)] = score);
    }
    for (double& each : p) total += each = std::exp(each - most);
    for (int64_t i = 0; i < dim; ++i) {
      double y = 0.0;
      for (int64_t key = 0; key < args.tokens; ++key) {
        y += p[static_cast<size_t>(key)] * at(key, 2 * channels + h + i);
      }
      out[static_cast<size_t>(query * channels + h + i)] = y / total;
    }
  }
  return out;
}

}  // namespace

void fuzz_block(Random& random, const deit::Kernels& set) {
  deit::BlockArgs args{};
  deit::AttentionArgs& attention = args.attention;
  attention.type = random.chance(0.3) ? deit::Scalar::bf16 : deit::Scalar::f32;
  const int64_t word = attention.type == deit::Scalar::bf16 ? 2 : 1;
  attention.batch = 1;
  attention.heads = random.between(1, 3);
  const bool turned = random.chance(0.3);
  attention.head_dim = random.size(30) * (turned ? 2 : word);
  attention.tokens = random.size(20);
  const int64_t images = random.between(1, 3), tokens = attention.tokens;
  const int64_t channels = attention.heads * attention.head_dim;
  const int64_t hidden = (random.chance(0.2) ? random.size(450) : random.size(90)) * word;
  attention.scale = 0.25f;
  attention.stride_token = 3 * channels;
  Tables tables(turned, tokens, attention.heads, attention.head_dim, random);
  attention.rope = tables.rope;
  set.attention.plan(attention);
  Norm norm1(channels, random, args.norm[0]), norm2(channels, random, args.norm[1]);
  Layer qkv(3 * channels, channels, false, args, random, set, args.qkv);
  Layer proj(channels, channels, true, args, random, set, args.proj);
  Layer fc1(hidden, channels, false, args, random, set, args.fc1);
  Layer fc2(channels, hidden, true, args, random, set, args.fc2);
  args.fc1.activation = any_activation(random, deit::Activation::gelu);
  Parameter key_bias(images * tokens, 0.4, random);
  attention.key_bias = key_bias.data;
  Elements x(images * tokens * channels, attention.type, random);
  for (int64_t i = 0; i < images * tokens * channels; ++i) x.randomise(i, random);
  Elements out(images * tokens * channels, attention.type, random);
  const int64_t parts = (channels + 63) / 64;
  Elements stats(images * tokens * 2 * parts, deit::Scalar::f32, random);
  args.x = x.memory.data(), args.out = out.memory.data();
  args.row_stats = stats.memory.floats();
  run(images, set.block.workspace(args), {&out, &stats}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.block.run(args, workspace, begin, end);
      });

  const Values all = x.values();
  for (int64_t image = 0; image < images; ++image) {
    const int64_t first = image * tokens * channels;
    Values s(all.begin() + first, all.begin() + first + tokens * channels);
    const Values mixed =
        attend(qkv(norm1(s), tokens), attention, key_bias, tables, image * tokens);
    const Values branch = proj(mixed, tokens);
    for (size_t i = 0; i < s.size(); ++i) s[i] += branch[i];
    Values h = fc1(norm2(s), tokens);
    for (double& each : h) each = activated(each, args.fc1.activation).value;
    const Values mlp = fc2(h, tokens);
    for (int64_t i = 0; i < tokens * channels; ++i) {
      const size_t at = static_cast<size_t>(i);
      // Rounding to bf16 between the products is not the loop's.
      near("out", first + i, out.at(first + i), s[at] + mlp[at],
           attention.type == deit::Scalar::f32 ? 1e-3 : 0.15);
    }
  }
  for (int64_t row = 0; row < images * tokens; ++row) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t columns = std::min<int64_t>(64, channels - part * 64);
      double mean = 0.0, square = 0.0;
      const auto at = [&](int64_t i) { return out.at(row * channels + part * 64 + i); };
      for (int64_t i = 0; i < columns; ++i) mean += at(i) / static_cast<double>(columns);
      for (int64_t i = 0; i < columns; ++i) square += std::pow(at(i) - mean, 2);
      const int64_t place = row * 2 * parts + part;
      near("mean", place, stats.at(place), mean, deit::Scalar::f32);
      near("squares", place + parts, stats.at(place + parts), square, deit::Scalar::f32);
    }
  }
}

}  // namespace fuzz
