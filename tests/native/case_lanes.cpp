// The vector type of each instruction set, lane by lane: what the kernels rely on at NaN, infinity
// and the ends of a type's range, where the other cases draw no numbers.
#include <cmath>
#include <limits>

#include "cases.h"
#include "fence.h"
#include "lanes.h"

namespace fuzz {
namespace {

constexpr int kMost = 16;  // lanes
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const Lanes& lanes_of(const std::string& name) {
  for (const Lanes* each : {
#if defined(__x86_64__) || defined(_M_X64)
           &avx2_lanes, &avx512_lanes, &avx512_bf16_lanes,
#elif defined(__aarch64__) && defined(__linux__)
           &neon_lanes, &neon_bf16_lanes,
#endif
           &portable_lanes}) {
    if (name == each->name) return *each;
  }
  fail("no lanes of " + name);
}

float any(Random& random) {
  constexpr float kEdges[] = {0.0f,   -0.0f,  kNan,    kInfinity, -kInfinity, 1e-42f, -1e-42f,
                              65504.0f, 65519.0f, 65520.0f, 6e-8f,  3e-8f,      3.4e38f, -3.4e38f};
  if (random.chance(0.3)) return kEdges[random.between(0, std::size(kEdges) - 1)];
  const float size = std::ldexp(1.0f, static_cast<int>(random.between(-30, 30)));
  return static_cast<float>(random.between(-(1 << 24), 1 << 24)) / (1 << 23) * size;
}

bool same(float a, float b) {
  if (a != a) return b != b;
  return a == b && std::signbit(a) == std::signbit(b);
}

void expect(const char* what, int lane, float found, float exact, bool right) {
  if (right) return;
  fail(std::string(what) + ": lane " + std::to_string(lane) + " is " + std::to_string(found) +
       ", expected " + std::to_string(exact));
}

double decoded(uint32_t bits, bool bf16) {
  const int fraction_bits = bf16 ? 7 : 10, bias = bf16 ? 127 : 15;
  const int exponent = static_cast<int>(bits >> fraction_bits) & (2 * bias + 1);
  const int fraction = static_cast<int>(bits & ((1u << fraction_bits) - 1u));
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == 2 * bias + 1 && fraction) return kNan;
  // Infinity where the next number would be: what rounds to it is as near to that.
  const int one = exponent ? 1 << fraction_bits : 0;
  return sign * std::ldexp(one + fraction, std::max(exponent, 1) - bias - fraction_bits);
}

// Whether `half` is the number of its type that is nearest to x, the even one of two.
bool nearest(float x, uint32_t half, bool bf16) {
  const double found = decoded(half, bf16);
  if (x != x) return found != found;
  const double most = decoded(bf16 ? 0x7f80u : 0x7c00u, bf16);
  const double exact = std::min(std::max(static_cast<double>(x), -most), most);
  if (found != found || std::signbit(found) != std::signbit(x)) return false;
  const double off = std::abs(found - exact);
  for (const uint32_t other : {half - 1u, half + 1u}) {
    if ((other ^ half) >> 15) continue;  // past zero
    const double away = std::abs(decoded(other & 0xffffu, bf16) - exact);
    if (away < off || (away == off && half % 2)) return false;
  }
  return true;
}

void check_arithmetic(const Lanes& set, Random& random) {
  float a[kMost], b[kMost], c[kMost], to[kMost];
  const auto apply = [&](Op op, const char* name, auto exact, auto right) {
    set.apply(op, a, b, c, to);
    for (int i = 0; i < set.width; ++i) {
      const float wanted = exact(i);
      expect(name, i, to[i], wanted, right(to[i], wanted));
    }
  };
  for (int i = 0; i < kMost; ++i) a[i] = any(random), b[i] = any(random), c[i] = any(random);
  apply(Op::max, "max", [&](int i) { return a[i] > b[i] ? a[i] : b[i]; }, same);
  apply(Op::min, "min", [&](int i) { return a[i] < b[i] ? a[i] : b[i]; }, same);
  apply(Op::swap_pairs, "swap_pairs", [&](int i) { return a[i ^ 1]; }, same);
  if (set.fused) {
    apply(Op::fma, "fma", [&](int i) { return std::fma(a[i], b[i], c[i]); }, same);
  }
  const int n = static_cast<int>(random.between(0, set.width));
  set.first(a, n, to);
  for (int i = 0; i < set.width; ++i) {
    expect("first", i, to[i], i < n ? a[i] : 0.0f, same(to[i], i < n ? a[i] : 0.0f));
  }

  float total = 0.0f, most = -kInfinity;
  for (int i = 0; i < kMost; ++i) {
    a[i] = static_cast<float>(random.between(-(1 << 20), 1 << 20)) / 2.0f;  // half of them ties
    b[i] = static_cast<float>(random.between(-150, 0));
    if (i < set.width) total += a[i], most = std::max(most, a[i]);
  }
  apply(Op::round, "round", [&](int i) { return std::nearbyint(a[i]); },
        [](float found, float exact) { return found == exact; });
  expect("sum", 0, set.sum(a), total, set.sum(a) == total);  // of halves: exact in any order
  expect("largest", 0, set.largest(a), most, set.largest(a) == most);
  for (float& x : a) x = 1.0f + static_cast<float>(random.between(0, 1 << 20)) / (1 << 20);
  apply(Op::scale_by_power, "scale_by_power",
        [&](int i) {
          const double wide = a[i];
          return static_cast<float>(std::ldexp(wide, static_cast<int>(b[i])));
        },
        same);

  for (float& x : a) x = -std::abs(any(random));
  a[0] = -static_cast<float>(random.between(0, 110 << 10)) / 1024.0f;
  apply(Op::exp, "exp",
        [&](int i) { return static_cast<float>(std::exp(static_cast<double>(a[i]))); },
        [](float found, float exact) {
          return exact != exact ? found != found
                                : std::abs(found - exact) <= std::max(2.4e-7f * exact, 3e-45f);
        });
}

// Words of two bf16 that are small whole numbers: exact however an instruction rounds.
void check_pairs(const Lanes& set, Random& random) {
  float words[2][kMost], c[kMost], to[kMost];
  double exact[kMost];
  for (int i = 0; i < kMost; ++i) {
    float numbers[2][2];
    for (int side = 0; side < 2; ++side) {
      uint32_t word = 0;
      for (int half = 0; half < 2; ++half) {
        const float x = numbers[side][half] = static_cast<float>(random.between(-128, 128));
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        word |= bits >> 16 << (16 * half);
      }
      std::memcpy(&words[side][i], &word, 4);
    }
    c[i] = static_cast<float>(random.between(-1000, 1000));
    exact[i] = c[i] + numbers[0][0] * numbers[1][0] + numbers[0][1] * numbers[1][1];
  }
  set.apply(Op::multiply_pairs, words[0], words[1], c, to);
  for (int i = 0; i < set.width; ++i) {
    expect("multiply_pairs", i, to[i], static_cast<float>(exact[i]), to[i] == exact[i]);
  }
}

void check_transpose(const Lanes& set) {
  float square[kMost * kMost];
  const int width = set.width;
  for (int i = 0; i < width * width; ++i) square[i] = static_cast<float>(i);
  set.transpose(square);
  for (int i = 0; i < width * width; ++i) {
    const float exact = static_cast<float>(i % width * width + i / width);
    expect("transpose", i, square[i], exact, square[i] == exact);
  }
}

void check_halves(const Lanes& set, bool bf16, Random& random) {
  const char* name = bf16 ? "bf16" : "fp16";
  uint16_t halves[kMost], two[2 * kMost];
  float wide[kMost], pair[2 * kMost];
  const uint32_t infinity = bf16 ? 0x7f80u : 0x7c00u;
  const int64_t start = random.between(0, 15) << 12;  // a sixteenth of all there are
  for (int64_t code = start; code < start + (1 << 12); code += set.width) {
    for (int i = 0; i < set.width; ++i) halves[i] = static_cast<uint16_t>(code + i);
    set.widen(bf16, halves, wide);
    for (int i = 0; i < set.width; ++i) {
      const float exact = (halves[i] & 0x7fffu) == infinity
                              ? (halves[i] >> 15 ? -kInfinity : kInfinity)
                              : static_cast<float>(decoded(halves[i], bf16));
      expect(name, i, wide[i], exact, same(wide[i], exact));
    }
    // These, what lies between them and the next, and anything else.
    for (int i = 0; i < set.width; ++i) {
      const uint16_t next = static_cast<uint16_t>(halves[i] + 1);
      const double between = (decoded(halves[i], bf16) + decoded(next, bf16)) / 2;
      if (random.chance(0.5)) wide[i] = static_cast<float>(between);
      if (random.chance(0.3)) wide[i] = std::nextafter(wide[i], any(random));
      if (random.chance(0.2)) wide[i] = any(random);
    }
    set.narrow(bf16, wide, halves);
    for (int i = 0; i < set.width; ++i) {
      expect(name, i, static_cast<float>(decoded(halves[i], bf16)), wide[i],
             nearest(wide[i], halves[i], bf16));
    }
    for (int i = 0; i < set.width; ++i) {
      pair[i] = wide[i];
      pair[2 * set.width - 1 - i] = wide[i];
    }
    set.narrow_two(bf16, pair, two);
    for (int i = 0; i < set.width; ++i) {
      expect(name, i, two[i], halves[i], two[i] == halves[i]);
      const int mirrored = 2 * set.width - 1 - i;
      expect(name, mirrored, two[mirrored], halves[i], two[mirrored] == halves[i]);
    }
  }
}

}  // namespace

void fuzz_lanes(Random& random, const deit::Kernels& kernels) {
  const Lanes& set = lanes_of(kernels.name);
  for (int turn = 0; turn < 16; ++turn) check_arithmetic(set, random);
  check_pairs(set, random);
  check_transpose(set);
  check_halves(set, random.chance(0.5), random);
}

}  // namespace fuzz
