// Products in 8-bit integers: one or two, after a LayerNorm or none, with GELU and residual.
#include "../../csrc/cpu/int8.h"

#include "../../csrc/cpu/dispatch.h"
#include "cases.h"
#include "fence.h"

namespace fuzz {
namespace {

// Random int8 weights in the kernels' layout, and the same as a plain matrix in double.
struct Weight {
  Weight(int64_t features, int64_t depth, Random& random)
      : panels((features + deit::kPanelColumns - 1) / deit::kPanelColumns),
        padded_depth((depth + 3) / 4 * 4),
        packed(static_cast<size_t>(panels * deit::kPanelColumns * padded_depth), random, 64),
        sums(static_cast<size_t>(panels * deit::kPanelColumns) * 4, random, 4),
        scales(static_cast<size_t>(panels * deit::kPanelColumns) * 4, random, 4),
        bias(static_cast<size_t>(panels * deit::kPanelColumns) * 4, random, 4),
        plain(static_cast<size_t>(features * depth)) {
    int8_t* to = static_cast<int8_t*>(packed.data());
    std::memset(to, 0, packed.bytes());
    for (int64_t n = 0; n < panels * deit::kPanelColumns; ++n) {
      const bool real = n < features;
      const float scale = real ? 1.0f / (100.0f * std::sqrt(static_cast<float>(depth))) : 0.0f;
      int32_t sum = 0;
      for (int64_t k = 0; real && k < depth; ++k) {
        const int8_t w = static_cast<int8_t>(random.between(-127, 127));
        const int64_t panel = n / deit::kPanelColumns, within = n % deit::kPanelColumns;
        to[((panel * (padded_depth / 4) + k / 4) * deit::kPanelColumns + within) * 4 + k % 4] = w;
        plain[static_cast<size_t>(n * depth + k)] = static_cast<double>(w) * scale;
        sum += w;
      }
      static_cast<int32_t*>(sums.data())[n] = sum;
      scales.floats()[n] = scale;
      bias.floats()[n] = real ? static_cast<float>(random.between(-64, 64)) / 64.0f : 0.0f;
    }
    args = {to, static_cast<const int32_t*>(sums.data()), scales.floats(), bias.floats(), features,
            depth};
  }

  std::vector<double> times(const std::vector<double>& row) {
    std::vector<double> y(static_cast<size_t>(args.features));
    for (int64_t n = 0; n < args.features; ++n) {
      double total = bias.floats()[n];
      for (int64_t k = 0; k < args.depth; ++k) {
        total += row[static_cast<size_t>(k)] * plain[static_cast<size_t>(n * args.depth + k)];
      }
      y[static_cast<size_t>(n)] = total;
    }
    return y;
  }

  int64_t panels, padded_depth;
  Fenced packed, sums, scales, bias;
  std::vector<double> plain;
  deit::Int8Weight args;
};

// The 8-bit sets that belong to one of isa.h's, the best first.
std::vector<const deit::Int8Kernels*> sets_of(const std::string& name) {
#if defined(__x86_64__) || defined(_M_X64)
  if (name == "avx512") {
    if (__builtin_cpu_supports("avx512vnni")) return {&deit::avx512vnni_int8};
    return {};
  }
  if (name == "avx2") {
    if (__builtin_cpu_supports("avxvnni")) return {&deit::avxvnni_int8, &deit::avx2_int8};
    return {&deit::avx2_int8};
  }
#elif defined(__aarch64__) && defined(__linux__)
  if (name == "neon") {
    std::vector<const deit::Int8Kernels*> sets = {&deit::neon_int8};
    if (deit::has_dotprod()) sets.push_back(&deit::neon_dotprod_int8);
    if (deit::has_i8mm()) sets.push_back(&deit::neon_i8mm_int8);
    return sets;
  }
#endif
  if (name == "portable") return {&deit::portable_int8};
  return {};
}

std::vector<double> normalised(std::vector<double> row, Parameter& weight, Parameter& bias) {
  double mean = 0.0, variance = 0.0;
  const double count = static_cast<double>(row.size());
  for (const double y : row) mean += y / count;
  for (const double y : row) variance += (y - mean) * (y - mean) / count;
  for (size_t i = 0; i < row.size(); ++i) {
    row[i] = (row[i] - mean) / std::sqrt(variance + 1e-5) *
                 weight.at(static_cast<int64_t>(i), 1.0) +
             bias.at(static_cast<int64_t>(i), 0.0);
  }
  return row;
}

std::vector<double> by_portable(const deit::Int8Args& args, Elements& out, Random& random) {
  const deit::Int8Kernels& set = deit::portable_int8;
  Fenced workspace(set.workspace(args), random, 64);
  set.run(args, workspace.data(), 0, (args.rows + set.group - 1) / set.group);
  return out.values();
}

}  // namespace

void fuzz_int8(Random& random, const deit::Kernels& set) {
  const int64_t depth = random.size(140), features = random.size(100);
  const bool two = random.chance(0.4), norm = random.chance(0.5), add = random.chance(0.5);
  Weight first(two ? random.size(150) : features, depth, random);
  Weight second(features, two ? first.args.features : 1, random);
  // Now and then more rows than one pass takes.
  const bool many = random.chance(0.1);
  const std::vector<int64_t> sizes = {random.between(1, 4),
                                      many ? random.between(60, 120) : random.size(40)};
  Strided x(sizes, depth, deit::Scalar::f32, random);
  Strided residual(sizes, features, deit::Scalar::f32, random);
  Parameter weight(depth, norm ? 1.0 : 0.0, random), bias(depth, norm ? 0.7 : 0.0, random);
  Elements out(x.count * features, deit::Scalar::f32, random);
  deit::Int8Args args{};
  args.x = x.rows;
  if (add) args.residual = residual.rows;
  args.norm.weight = weight.data, args.norm.bias = bias.data;
  args.norm.channels = depth, args.norm.eps = 1e-5f;
  args.first = first.args;
  if (two) args.second = second.args;
  args.out = out.memory.floats();
  args.rows = x.count;
  // The launcher takes GELU without residual, and a residual without GELU, after one product.
  args.gelu = two || (!add && random.chance(0.5));
  // One product quantises numbers that all sets have to the last bit, so its integers are the same.
  std::vector<double> integers;
  if (!norm && !two) integers = by_portable(args, out, random);
  for (const deit::Int8Kernels* each : sets_of(set.name)) {
    run((x.count + each->group - 1) / each->group, (each->workspace(args) + 3) / 4, {&out}, random,
        [&](float* workspace, int64_t begin, int64_t end) {
          each->run(args, workspace, begin, end);
        });
    for (int64_t row = 0; row < x.count; ++row) {
      std::vector<double> y(static_cast<size_t>(depth));
      for (int64_t i = 0; i < depth; ++i) y[static_cast<size_t>(i)] = x.at(row, i);
      if (norm) y = normalised(y, weight, bias);
      y = first.times(y);
      if (args.gelu) {
        for (double& value : y) value *= 0.5 * std::erfc(-value * std::sqrt(0.5));
      }
      if (two) y = second.times(y);
      for (int64_t i = 0; i < features; ++i) {  // 8 bits: a row's range over 255, twice
        near("out", row * features + i, out.at(row * features + i),
             y[static_cast<size_t>(i)] + (add ? residual.at(row, i) : 0.0), 0.15);
        if (!integers.empty()) {
          near(each->name, row * features + i, out.at(row * features + i),
               integers[static_cast<size_t>(row * features + i)], 2e-5);
        }
      }
    }
  }
}

}  // namespace fuzz
