// The operators in 8-bit integers of kernels/int8.py: checks, outputs, the split over threads, and
// which instruction set runs them.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#include "../common/tensors.h"
#include "int8.h"

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

const Int8Kernels& int8_kernels() {
  const Int8Kernels* set = selected.load(std::memory_order_relaxed);
  if (set == nullptr) {
    set = *std::find_if(std::begin(kSets), std::end(kSets),
                        [](const Int8Kernels* each) { return runs_here(*each); });
    selected.store(set, std::memory_order_relaxed);
  }
  return *set;
}

// Multiply-adds below which another thread costs more than it saves: PyTorch's own figure is 32768
// elements, read and written, and a vector instruction does 64 of these.
constexpr int64_t kGrain = 32768 * 32;

struct FreeAligned {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<std::byte[], FreeAligned>;

Buffer allocate(size_t bytes) {
  return Buffer(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
}

const float* fp32_vector(const char* name, const std::optional<Tensor>& value, int64_t numel,
                         const Tensor& like, Tensor& holder) {
  if (!value.has_value()) return nullptr;
  check_parameter(name, *value, numel, like);
  STD_TORCH_CHECK(value->scalar_type() == ScalarType::Float, name, ": expected fp32");
  holder = value->is_contiguous() ? *value : torch::stable::contiguous(*value);
  return static_cast<const float*>(holder.const_data_ptr());
}

// A weight as the kernels read it. `columns` holds its scales and biases, times gamma, with zeros
// up to a whole panel; the tensors given must outlive it.
Int8Weight weight_of(const Tensor& x, int64_t depth, const Tensor& packed, const Tensor& scales,
                     const Tensor& sums, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& gamma, Buffer& columns) {
  Int8Weight weight{};
  weight.features = scales.numel();
  weight.depth = depth;
  const int64_t panels = (weight.features + kPanelColumns - 1) / kPanelColumns;
  STD_TORCH_CHECK(depth >= 1 && depth <= kMaxDepth, "x: expected 1 to ", kMaxDepth,
                  " channels; got ", depth);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Char && packed.is_contiguous() &&
                      packed.numel() == panels * kPanelColumns * ((depth + 3) / 4 * 4),
                  "packed: expected contiguous int8 of [", panels, ", ", (depth + 3) / 4,
                  ", 32, 4], as quantize_weight makes it");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Int && sums.is_contiguous() &&
                      sums.numel() == panels * kPanelColumns,
                  "sums: expected contiguous int32 of [", panels * kPanelColumns, "]");
  check_parameter("packed", packed, packed.numel(), x);
  check_parameter("sums", sums, sums.numel(), x);
  weight.packed = static_cast<const int8_t*>(packed.const_data_ptr());
  weight.sums = static_cast<const int32_t*>(sums.const_data_ptr());
  Tensor held[3];
  const float* scale = fp32_vector("scales", scales, weight.features, x, held[0]);
  const float* shift = fp32_vector("bias", bias, weight.features, x, held[1]);
  const float* factor = fp32_vector("gamma", gamma, weight.features, x, held[2]);
  const int64_t padded = panels * kPanelColumns;
  columns = allocate(static_cast<size_t>(2 * padded) * sizeof(float));
  float* folded = reinterpret_cast<float*>(columns.get());
  std::fill(folded, folded + 2 * padded, 0.0f);
  for (int64_t n = 0; n < weight.features; ++n) {
    const float times = factor ? factor[n] : 1.0f;
    folded[n] = scale[n] * times;
    folded[padded + n] = shift ? shift[n] * times : 0.0f;
  }
  weight.scales = folded;
  weight.bias = folded + padded;
  return weight;
}

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
  const Int8Kernels& set = int8_kernels();
  const int64_t work = set.group * (args.first.features * args.first.depth +
                                    args.second.features * args.second.depth);
  const int64_t groups = (args.rows + set.group - 1) / set.group;
  torch::stable::parallel_for(0, groups, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t begin, int64_t end) {
                                const Buffer workspace = allocate(set.workspace(args));
                                set.run(args, workspace.get(), begin, end);
                              });
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
