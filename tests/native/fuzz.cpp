// Every C++ kernel of csrc/cpu on random shapes, strides and types, by every instruction set that
// runs here, against a plain double loop. Built with sanitizers by sanitize.py (`make sanitize`).
//
//   fuzz CASES SEED SET...    CASES cases of each kernel from SEED on, by each instruction set
//   fuzz --trip address|undefined|thread    does what that sanitizer must report
//
// Exit status 0: all as expected.
//
// To add a kernel: a function `void fuzz_NAME(Random&, const deit::Kernels&)` that draws its
// arguments (inputs in Elements, so that they are fenced), calls `run` with the kernel's number of
// tasks and workspace, and compares each output with a loop in double by `near`; its line in kCases;
// and the new size in the static_assert there.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>

#include "../../csrc/cpu/isa.h"
#include "fence.h"

extern "C" int deit_cpu_select_isa(const char* name);

namespace fuzz {
namespace {

// [rows..., width] at random strides, in no more memory than they reach. Some axes overlap
// (stride 0, as after `expand`), some leave gaps of NaN.
struct Strided {
  Strided(const std::vector<int64_t>& sizes, int64_t width, deit::Scalar type, Random& random)
      : rows(lay_out(sizes, width, random)), width(width), elements(span, type, random) {
    rows.data = elements.memory.data();
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t i = 0; i < width; ++i) elements.randomise(offset(row) + i, random);
    }
  }

  deit::Rows lay_out(const std::vector<int64_t>& sizes, int64_t width, Random& random) {
    deit::Rows rows{};
    rows.dims = static_cast<int>(sizes.size());
    std::vector<int> order(sizes.size());
    for (size_t d = 0; d < sizes.size(); ++d) order[d] = static_cast<int>(d);
    for (size_t d = 1; d < order.size(); ++d) {
      std::swap(order[d], order[static_cast<size_t>(random.between(0, static_cast<int64_t>(d)))]);
    }
    int64_t reach = width;
    for (const int d : order) {
      const int64_t size = sizes[static_cast<size_t>(d)];
      rows.sizes[d] = size;
      rows.strides[d] = random.chance(0.1) ? 0 : reach + (random.chance(0.5) ? random.size(9) : 0);
      reach += (size - 1) * rows.strides[d];
      count *= size;
    }
    span = reach;
    return rows;
  }

  int64_t offset(int64_t row) const {
    int64_t total = 0;
    for (int d = rows.dims - 1; d >= 0; --d) {
      total += row % rows.sizes[d] * rows.strides[d];
      row /= rows.sizes[d];
    }
    return total;
  }
  double at(int64_t row, int64_t i) { return elements.at(offset(row) + i); }

  int64_t count = 1, span = 0;
  deit::Rows rows;
  int64_t width;
  Elements elements;
};

void fuzz_layer_norm(Random& random, const deit::Kernels& set) {
  std::vector<int64_t> sizes;
  for (int64_t d = random.between(0, deit::kMaxLeadingDims); d > 0; --d) {
    sizes.push_back(random.between(1, 4));
  }
  const int64_t width = random.chance(0.05) ? random.size(2100) : random.size(140);
  const bool add = random.chance(0.6);
  deit::LayerNormArgs args{};
  args.x_type = random.type();
  args.residual_type = random.chance(0.5) ? args.x_type : deit::Scalar::f32;
  Strided x(sizes, width, args.x_type, random);
  Strided residual(sizes, width, args.residual_type, random);
  Parameter weight(width, 1.0, random), bias(width, 0.7, random);
  const int64_t samples = sizes.empty() ? 1 : sizes[0];
  Parameter gamma(width, add ? 0.5 : 0.0, random), keep(samples, add ? 0.5 : 0.0, random);
  Elements out(x.count * width, args.x_type, random);
  Elements sum(add ? x.count * width : 0, args.residual_type, random);
  args.x = x.rows;
  if (add) args.residual = residual.rows;
  args.weight = weight.data, args.bias = bias.data, args.gamma = gamma.data, args.keep = keep.data;
  args.out = out.memory.data();
  if (add) args.sum = sum.memory.data();
  args.channels = width;
  args.rows_per_sample = x.count / samples;
  args.eps = 1e-5f;
  run(x.count, set.layer_norm_workspace(args), {&out, &sum}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.layer_norm(args, workspace, begin, end);
      });

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

void fuzz_attention(Random& random, const deit::Kernels& set) {
  deit::AttentionArgs args{};
  args.type = random.type();
  args.batch = random.between(1, 3);
  args.heads = random.between(1, 3);
  args.tokens = random.chance(0.1) ? random.size(300) : random.size(70);
  args.head_dim = random.chance(0.3) ? 64 : random.size(80);
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
  set.plan_attention(args);
  run(args.batch * args.heads * args.tiles, set.attention_workspace(args), {&out}, random,
      [&](float* workspace, int64_t begin, int64_t end) {
        set.attention(args, workspace, begin, end);
      });

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
        score += at(query, 0, i) * at(key, 1, i) * static_cast<double>(args.scale);
      }
      p[static_cast<size_t>(key)] = score;
      largest = std::max(largest, score);
    }
    for (double& each : p) total += each = largest == -INFINITY ? 0.0 : std::exp(each - largest);
    for (int64_t i = 0; i < args.head_dim; ++i) {
      double y = 0.0;
      for (int64_t key = 0; key < args.tokens; ++key) y += p[static_cast<size_t>(key)] * at(key, 2, i);
      const int64_t index = (b * args.tokens + query) * channels + h * args.head_dim + i;
      near("out", index, out.at(index), total > 0.0 ? y / total : 0.0, args.type);
    }
  }
}

struct Case {
  const char* name;
  void (*fuzz)(Random&, const deit::Kernels&);
};
constexpr Case kCases[] = {
    {"layer_norm", fuzz_layer_norm},
    {"attention", fuzz_attention},
};
static_assert(sizeof(deit::Kernels) == 6 * sizeof(void*),
              "Kernels has a new entry: give it a case above, then its new size here");

// A sanitizer that does not ring is no sanitizer: sanitize.py sets each off first.
int trip(const std::string& which) {
  volatile int one = 1;
  if (which == "address") {
    std::unique_ptr<float[]> memory(new float[static_cast<size_t>(one)]);
    const volatile float* past = memory.get() + one;
    return *past > 0.0f;
  }
  if (which == "undefined") {
    const volatile int past = one + 0x7fffffff;
    return past;
  }
  int shared = 0;
  std::thread other([&] { shared += 1; });
  shared += 1;
  other.join();
  return shared != 2;
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--trip") return fuzz::trip(argv[2]);
  if (argc < 4) {
    std::fprintf(stderr, "usage: fuzz CASES SEED SET..., or fuzz --trip WHICH\n");
    return 2;
  }
  const uint64_t cases = std::strtoull(argv[1], nullptr, 10);
  const uint64_t first = std::strtoull(argv[2], nullptr, 10);
  __sanitizer_set_death_callback(
      [] { std::fprintf(stderr, "while running %s\n", fuzz::where.c_str()); });
  for (int i = 3; i < argc; ++i) {
    const char* isa = argv[i];
    const int refused = deit_cpu_select_isa(isa);
    if (refused == 1) fuzz::fail(std::string("no instruction set ") + isa);
    if (refused) {
      std::printf("%s: this processor does not run it\n", isa);
      continue;
    }
    for (const fuzz::Case& each : fuzz::kCases) {
      for (uint64_t seed = first; seed < first + cases; ++seed) {
        fuzz::where = std::string(each.name) + ", " + isa + ", seed " + std::to_string(seed);
        fuzz::Random random(seed);
        each.fuzz(random, deit::kernels());
      }
      std::printf("%s: %s: %llu cases\n", isa, each.name, static_cast<unsigned long long>(cases));
    }
  }
  return 0;
}
