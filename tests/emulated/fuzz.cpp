// Every CUDA kernel that csrc/cuda/device.h lets run on a CPU, on random shapes, strides, types and
// orders of its threads, against a plain loop in double. Built with sanitizers by sanitize.py.
//
//   fuzz CASES SEED [KERNEL]      CASES cases of each kernel, or of one, from SEED on
//   fuzz --barriers SEED KERNEL   the barriers, FILE:LINE, that the case has
// with, before these, faults that must be found:
//   --drop FILE:LINE   a barrier that nobody waits at, or "all"
//   --transpose        two of the four matrices of a load exchanged
//   --withhold         16 bytes of shared memory less than was asked for
//   --unmask           copies that bring what lies behind a matrix in the place of zeros
//
// Exit status 0: all as expected.
#include <limits>
#include <optional>

#include "../../csrc/cuda/attention.h"
#include "../../csrc/cuda/layer_norm.h"
#include "../../csrc/cuda/linear.h"
#include "../../csrc/cuda/patch_embed.h"
#include "../native/fence.h"
#include "emulator.h"

namespace fuzz {
namespace {

using deit::Scalar;

// A vector in one of two types, or none.
struct Vector {
  Vector(int64_t count, double present, Scalar type, bool or_fp32, Random& random)
      : elements(random.chance(present) ? count : 0,
                 or_fp32 && random.chance(0.5) ? Scalar::f32 : type, random),
        values{elements.memory.bytes() ? elements.memory.data() : nullptr,
               elements.type == Scalar::f32} {
    for (int64_t i = 0; values.data && i < count; ++i) elements.randomise(i, random);
  }
  double at(int64_t i, double otherwise) { return values.data ? elements.at(i) : otherwise; }

  Elements elements;
  deit::Values values;
};

// A size, half the time of whole chunks of 16 bytes.
int64_t size(int64_t most, Random& random) {
  return random.chance(0.5) ? 8 * random.between(1, most / 8) : random.size(most);
}

// [rows, columns], `stride` numbers from row to row, the gaps NaN.
struct Grid {
  Grid(int64_t rows, int64_t columns, Scalar type, Random& random)
      : stride(random.chance(0.05) ? 0 : columns + (random.chance(0.5) ? size(24, random) : 0)),
        elements((rows - 1) * stride + columns, type, random) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < columns; ++i) elements.randomise(row * stride + i, random);
    }
  }
  double at(int64_t row, int64_t i) { return elements.at(row * stride + i); }
  const void* data() { return elements.memory.data(); }

  int64_t stride;
  Elements elements;
};

void launched(const char* error) {
  if (error != nullptr) fail(error);
}

double activated(deit::Activation activation, double x) {
  switch (activation) {
    case deit::Activation::gelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case deit::Activation::gelu_tanh:
      return x / (1.0 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)));
    case deit::Activation::quick_gelu: return x / (1.0 + std::exp(-1.702 * x));
    case deit::Activation::silu: return x / (1.0 + std::exp(-x));
    default: return x;
  }
}

void fuzz_linear(Random& random) {
  const int64_t samples = random.between(1, 3), rows = samples * random.size(45);
  const int64_t width = size(90, random), depth = random.chance(0.02) ? 0 : size(110, random);
  const Scalar type = random.type();
  const bool residual = random.chance(0.5);
  const Scalar to = residual && random.chance(0.5) ? Scalar::f32 : type;
  Grid x(rows, depth, type, random), weight(width, depth, type, random);
  Grid added(residual ? rows : 1, width, to, random);
  Vector bias(width, 0.7, type, false, random), gamma(width, 0.4, type, true, random);
  Vector keep(samples, 0.4, type, true, random);
  Elements out(rows * width, to, random);
  deit::LinearArgs args{};
  args.x = x.data(), args.weight = weight.data(), args.out = out.memory.data();
  args.bias = bias.values.data, args.gamma = gamma.values, args.keep = keep.values;
  if (residual) args.residual = {added.data(), to == Scalar::f32};
  args.rows = rows, args.width = width, args.depth = depth, args.rows_per_sample = rows / samples;
  args.x_stride = x.stride, args.weight_stride = weight.stride;
  args.residual_stride = added.stride;
  args.activation = static_cast<deit::Activation>(random.between(0, 4));
  launched(deit::launch_linear(args, type, nullptr));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < width; ++column) {
      double y = bias.at(column, 0.0);
      for (int64_t k = 0; k < depth; ++k) y += x.at(row, k) * weight.at(column, k);
      y = activated(args.activation, y) * gamma.at(column, 1.0);
      y *= keep.at(row / args.rows_per_sample, 1.0);
      if (residual) y += added.at(row, column);
      near("out", row * width + column, out.at(row * width + column), y, type);
    }
  }
}

void fuzz_finish(Random& random) {
  const int64_t samples = random.between(1, 3), rows = samples * random.size(45);
  const int64_t width = size(90, random);
  const Scalar type = random.type();
  const bool residual = random.chance(0.5);
  const Scalar to = residual && random.chance(0.5) ? Scalar::f32 : type;
  Grid added(residual ? rows : 1, width, to, random);
  Vector gamma(width, 0.4, type, true, random), keep(samples, 0.4, type, true, random);
  Elements out(rows * width, to, random);
  std::vector<double> product;
  for (int64_t i = 0; i < rows * width; ++i) {
    out.randomise(i, random);
    product.push_back(out.at(i));
  }
  deit::LinearArgs args{};
  args.out = out.memory.data(), args.gamma = gamma.values, args.keep = keep.values;
  if (residual) args.residual = {added.data(), to == Scalar::f32};
  args.rows = rows, args.width = width, args.rows_per_sample = rows / samples;
  args.residual_stride = added.stride;
  args.activation = static_cast<deit::Activation>(random.between(0, 4));
  launched(deit::launch_finish(args, type, nullptr));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < width; ++column) {
      const int64_t i = row * width + column;
      double y = activated(args.activation, product[static_cast<size_t>(i)]);
      y *= gamma.at(column, 1.0) * keep.at(row / args.rows_per_sample, 1.0);
      if (residual) y += added.at(row, column);
      near("out", i, out.at(i), y, type);
    }
  }
}

void fuzz_attention(Random& random) {
  const int64_t batch = random.between(1, 2), heads = random.between(1, 2);
  const int64_t tokens = random.size(150), dim = size(random.chance(0.7) ? 64 : 128, random);
  const Scalar type = random.type();
  Grid qkv(batch * tokens, 3 * heads * dim, type, random);
  Vector key_bias(batch * tokens, 0.5, type, true, random);
  const bool nothing = key_bias.values.data && random.chance(0.3);  // the first sample's keys
  for (int64_t i = 0; nothing && i < tokens; ++i) {
    const auto set = [&](auto* to, auto infinite) { to[i] = infinite; };
    void* data = key_bias.elements.memory.data();
    if (key_bias.values.fp32) {
      set(static_cast<float*>(data), -std::numeric_limits<float>::infinity());
    } else {
      set(static_cast<uint16_t*>(data), uint16_t(type == Scalar::f16 ? 0xfc00 : 0xff80));
    }
  }
  Elements out(batch * tokens * heads * dim, type, random);
  deit::AttentionArgs args{};
  args.qkv = qkv.data(), args.key_bias = key_bias.values, args.out = out.memory.data();
  args.stride_token = qkv.stride, args.stride_batch = tokens * qkv.stride;
  args.batch = batch, args.tokens = tokens, args.heads = heads, args.head_dim = dim;
  args.scale = 0.2f / std::sqrt(static_cast<float>(dim));
  launched(deit::launch_attention(args, type, nullptr));
  std::vector<double> weights(static_cast<size_t>(tokens));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t head = 0; head < heads; ++head) {
      const auto at = [&](int which, int64_t token, int64_t i) {
        return qkv.at(b * tokens + token, (which * heads + head) * dim + i);
      };
      for (int64_t query = 0; query < tokens; ++query) {
        double largest = -INFINITY, total = 0.0;
        for (int64_t key = 0; key < tokens; ++key) {
          double score = 0.0;
          for (int64_t i = 0; i < dim; ++i) score += at(0, query, i) * at(1, key, i);
          score = score * static_cast<double>(args.scale) + key_bias.at(b * tokens + key, 0.0);
          weights[static_cast<size_t>(key)] = score;
          largest = std::max(largest, score);
        }
        for (double& weight : weights) {
          weight = largest == -INFINITY ? 0.0 : std::exp(weight - largest);
          total += weight;
        }
        for (int64_t i = 0; i < dim; ++i) {
          double y = 0.0;
          for (int64_t key = 0; key < tokens; ++key) {
            y += weights[static_cast<size_t>(key)] * at(2, key, i);
          }
          const int64_t to = ((b * tokens + query) * heads + head) * dim + i;
          near("out", to, out.at(to), total > 0.0 ? y / total : 0.0, type);
        }
      }
    }
  }
}

void fuzz_patch_embed(Random& random) {
  const Scalar type = random.type();
  deit::PatchEmbedArgs args{};
  args.batch = random.between(1, 3), args.channels = random.between(1, 3);
  args.high = random.size(9), args.wide = random.chance(0.5) ? 8 : random.size(9);
  args.down = random.between(1, 4), args.across = random.between(1, 4);
  args.before = random.between(0, 2), args.width = size(80, random);
  const int64_t patches = args.down * args.across, tokens = args.before + patches;
  const int64_t depth = args.channels * args.high * args.wide;
  const int64_t sizes[] = {args.batch, args.channels, args.down * args.high,
                           args.across * args.wide};
  int64_t reach = 1;
  for (int axis = 3; axis >= 0; --axis) {
    args.strides[axis] = reach;
    reach *= sizes[axis];
    if (random.chance(0.3)) reach += random.chance(0.5) ? 8 : 3;
  }
  if (random.chance(0.2)) {  // channels last
    args.strides[1] = 1;
    args.strides[3] = sizes[1];
    args.strides[2] = sizes[1] * sizes[3];
    args.strides[0] = sizes[1] * sizes[2] * sizes[3];
  }
  int64_t span = 1;
  for (int axis = 0; axis < 4; ++axis) span += (sizes[axis] - 1) * args.strides[axis];
  Elements images(span, type, random);
  for (int64_t i = 0; i < span; ++i) images.randomise(i, random);
  Vector weight(args.width * depth, 1.0, type, false, random);
  Vector bias(args.width, 0.7, type, false, random);
  Vector prefix(args.before * args.width, 1.0, type, false, random);
  Vector pos(tokens * args.width, 1.0, type, false, random);
  Elements out(args.batch * tokens * args.width, type, random);
  args.images = images.memory.data(), args.weight = weight.values.data;
  args.bias = bias.values.data, args.prefix = prefix.values.data;
  args.pos_embed = pos.values.data, args.out = out.memory.data();
  launched(deit::launch_patch_embed(args, type, nullptr));
  for (int64_t i = 0; i < args.batch * tokens * args.width; ++i) {
    const int64_t column = i % args.width, token = i / args.width % tokens;
    const int64_t image = i / args.width / tokens, patch = token - args.before;
    double y = pos.at(token * args.width + column, 0.0);
    if (patch < 0) {
      y += prefix.at(token * args.width + column, 0.0);
    } else {
      y += bias.at(column, 0.0);
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t channel = k / (args.high * args.wide), within = k % (args.high * args.wide);
        const int64_t row = patch / args.across * args.high + within / args.wide;
        const int64_t at = patch % args.across * args.wide + within % args.wide;
        y += weight.at(column * depth + k, 0.0) *
             images.at(image * args.strides[0] + channel * args.strides[1] +
                       row * args.strides[2] + at * args.strides[3]);
      }
    }
    near("out", i, out.at(i), y, type);
  }
}

void fuzz_layer_norm(Random& random) {
  std::vector<int64_t> sizes;
  for (int64_t d = random.between(0, deit::kMaxLeadingDims); d > 0; --d) {
    sizes.push_back(random.between(1, 3));
  }
  const int64_t width = random.chance(0.1) ? random.size(2100) : random.size(300);
  const Scalar type = random.type();
  const bool add = random.chance(0.6);
  const Scalar to = random.chance(0.5) ? type : Scalar::f32;
  Strided x(sizes, width, type, random), residual(sizes, width, to, random);
  const int64_t samples = sizes.empty() ? 1 : sizes[0];
  Vector weight(width, 1.0, type, true, random), bias(width, 0.7, type, true, random);
  Vector gamma(width, add ? 0.5 : 0.0, type, true, random);
  Vector keep(samples, add ? 0.5 : 0.0, type, true, random);
  Elements out(x.count * width, type, random), sum(add ? x.count * width : 0, to, random);
  deit::LayerNormArgs args{};
  args.x = x.rows;
  if (add) args.residual = residual.rows, args.sum = sum.memory.data();
  args.weight = weight.values, args.bias = bias.values;
  args.gamma = gamma.values, args.keep = keep.values;
  args.out = out.memory.data();
  args.rows = x.count, args.rows_per_sample = x.count / samples, args.channels = width;
  args.eps = 1e-5f;
  launched(deit::launch_layer_norm(args, type, add ? to : type, nullptr));
  std::vector<double> total(static_cast<size_t>(width));
  for (int64_t row = 0; row < x.count; ++row) {
    double mean = 0.0, variance = 0.0;
    for (int64_t i = 0; i < width; ++i) {
      double& y = total[static_cast<size_t>(i)] = x.at(row, i);
      if (add) {
        y = y * gamma.at(i, 1.0) * keep.at(row / args.rows_per_sample, 1.0) + residual.at(row, i);
        near("sum", row * width + i, sum.at(row * width + i), y, sum.type);
      }
      mean += y / static_cast<double>(width);
    }
    for (const double y : total) variance += (y - mean) * (y - mean) / static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) {
      const double y = (total[static_cast<size_t>(i)] - mean) / std::sqrt(variance + 1e-5);
      near("out", row * width + i, out.at(row * width + i),
           y * weight.at(i, 1.0) + bias.at(i, 0.0), out.type);
    }
  }
}

struct Case {
  const char* name;
  void (*fuzz)(Random&);
};
constexpr Case kCases[] = {{"linear", fuzz_linear},
                           {"linear_finish", fuzz_finish},
                           {"attention", fuzz_attention},
                           {"patch_embed", fuzz_patch_embed},
                           {"layer_norm", fuzz_layer_norm}};

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  deit::emulated::Settings& settings = deit::emulated::settings;
  std::vector<std::string> words(argv + 1, argv + argc);
  bool barriers = false;
  while (!words.empty() && words[0].rfind("--", 0) == 0) {
    const std::string fault = words[0];
    words.erase(words.begin());
    if (fault == "--transpose") settings.transposed = true;
    if (fault == "--withhold") settings.withheld = true;
    if (fault == "--unmask") settings.unmasked = true;
    if (fault == "--barriers") barriers = true, words.insert(words.begin(), "1");
    if (fault == "--drop") settings.dropped = words[0], words.erase(words.begin());
  }
  if (words.size() < 2) {
    std::fprintf(stderr, "usage: fuzz [FAULT...] CASES SEED [KERNEL], fuzz --barriers SEED KERNEL\n");
    return 2;
  }
  const uint64_t cases = std::strtoull(words[0].c_str(), nullptr, 10);
  const uint64_t first = std::strtoull(words[1].c_str(), nullptr, 10);
  for (const fuzz::Case& each : fuzz::kCases) {
    if (words.size() > 2 && words[2] != each.name) continue;
    for (uint64_t seed = first; seed < first + cases; ++seed) {
      fuzz::where = std::string(each.name) + ", seed " + std::to_string(seed);
      fuzz::Random random(seed);
      settings.seed = seed;
      settings.processors = random.chance(0.3) ? 0 : 1000;  // the large tiles, or the small
      each.fuzz(random);
    }
    if (!barriers) {
      std::printf("emulated: %s: %llu cases\n", each.name, static_cast<unsigned long long>(cases));
    }
  }
  for (const auto& [place, blocks] : settings.barriers) {
    if (barriers) std::printf("%s\n", place.c_str());
  }
  return 0;
}
