// The operators in 8-bit integers of kernels/int8.py: checks, outputs, the split over threads, and
// which instruction set runs them.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#include "int8_launch.h"

namespace deit {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool has_avxvnni() {  // not __builtin_cpu_supports, which names it only from GCC 11 and clang 17 on
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1u);
}
#endif

bool runs_here(const Int8Kernels& set) {
#if defined(__x86_64__) || defined(_M_X64)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (&set == &avx512vnni_int8) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
  }
  if (&set == &avxvnni_int8) return avx2 && has_avxvnni();
  if (&set == &avx2_int8) return avx2;
#endif
  return &set == &portable_int8;
}

// The fastest first.
const Int8Kernels* const kSets[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &avx512vnni_int8,
    &avxvnni_int8,
    &avx2_int8,
#endif
    &portable_int8,
};

std::atomic<const Int8Kernels*> selected{nullptr};

}  // namespace

const Int8Kernels& int8_kernels() {
  const Int8Kernels* set = selected.load(std::memory_order_relaxed);
  if (set == nullptr) {
    set = *std::find_if(std::begin(kSets), std::end(kSets),
                        [](const Int8Kernels* each) { return runs_here(*each); });
    selected.store(set, std::memory_order_relaxed);
  }
  return *set;
}

namespace {

// What both operators read beside their weights, in the order of their schemas.
struct Inputs {
  Tensor x;
  std::optional<Tensor> norm_weight, norm_bias;
  double eps;
  std::optional<Tensor> residual;
};

Tensor run(Inputs& in, Int8Args& args, int64_t features) {
  Tensor& x = in.x;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected fp32");
  Tensor held[2];
  args.norm.channels = args.first.depth;
  args.norm.eps = static_cast<float>(in.eps);
  args.norm.weight = fp32_vector("norm_weight", in.norm_weight, args.norm.channels, x, held[0]);
  args.norm.bias = fp32_vector("norm_bias", in.norm_bias, args.norm.channels, x, held[1]);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = features;
  Tensor out = torch::stable::new_empty(x, sizes);
  if (in.residual.has_value()) {
    check_residual(out, *in.residual);
    if (out.numel() > 0) args.residual = rows_of(*in.residual);
  }
  if (out.numel() == 0) return out;
  args.x = rows_of(x);
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.rows = out.numel() / features;
  run_int8(args);
  return out;
}

Tensor int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor sums, std::optional<Tensor> bias,
                   std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
                   bool gelu, std::optional<Tensor> residual, std::optional<Tensor> gamma) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  STD_TORCH_CHECK(!gelu || (!gamma.has_value() && !residual.has_value()),
                  "gelu: expected neither residual nor gamma beside it");
  Int8Args args{};
  Buffer columns;
  const int64_t depth = x.size(x.dim() - 1);
  args.first = weight_of(x, depth, packed, scales, sums, bias, gamma, columns);
  args.gelu = gelu;
  Inputs in{x, norm_weight, norm_bias, eps, residual};
  return run(in, args, args.first.features);
}

Tensor int8_gelu_mlp(Tensor x, Tensor packed1, Tensor scales1, Tensor sums1,
                     std::optional<Tensor> b1, Tensor packed2, Tensor scales2, Tensor sums2,
                     std::optional<Tensor> b2, std::optional<Tensor> norm_weight,
                     std::optional<Tensor> norm_bias, double eps, std::optional<Tensor> residual,
                     std::optional<Tensor> gamma) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected rank >= 1");
  Int8Args args{};
  Buffer columns[2];
  const int64_t depth = x.size(x.dim() - 1);
  args.first = weight_of(x, depth, packed1, scales1, sums1, b1, std::nullopt, columns[0]);
  args.second =
      weight_of(x, args.first.features, packed2, scales2, sums2, b2, gamma, columns[1]);
  Inputs in{x, norm_weight, norm_bias, eps, residual};
  return run(in, args, args.second.features);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("int8_linear_packed", TORCH_BOX(&deit::int8_linear));
  m.impl("int8_gelu_mlp_packed", TORCH_BOX(&deit::int8_gelu_mlp));
}

// For the tests, as deit_cpu_isa and deit_cpu_select_isa of dispatch.cpp.
#define DEIT_EXPORT __attribute__((visibility("default")))

extern "C" {

// "avx512vnni", "avxvnni", "avx2" or "portable": the set in use.
DEIT_EXPORT const char* deit_cpu_int8_isa() { return deit::int8_kernels().name; }

// 0: done; 1: no such set in this library; 2: this processor cannot run it. "" for the best.
DEIT_EXPORT int deit_cpu_select_int8_isa(const char* name) {
  if (name[0] == '\0') {
    deit::selected.store(nullptr, std::memory_order_relaxed);
    return 0;
  }
  for (const deit::Int8Kernels* set : deit::kSets) {
    if (std::strcmp(set->name, name) != 0) continue;
    if (!deit::runs_here(*set)) return 2;
    deit::selected.store(set, std::memory_order_relaxed);
    return 0;
  }
  return 1;
}

}  // extern "C"
