// Which instruction set the floating-point kernels run by.
#include "dispatch.h"

#include "isa.h"

namespace deit {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

bool runs_here(const Kernels& set) {
  if (&set == &avx512_bf16_kernels) return has_avx512() && __builtin_cpu_supports("avx512bf16");
  if (&set == &avx512_kernels) return has_avx512();
  if (&set == &avx2_kernels) return has_avx2();
  return true;
}

// The fastest first.
const Kernels* const kFloatSets[] = {&avx512_bf16_kernels, &avx512_kernels, &avx2_kernels,
                                     &portable_kernels};

#elif defined(__aarch64__) && defined(__linux__)

bool runs_here(const Kernels& set) { return &set != &neon_bf16_kernels || has_bf16(); }

const Kernels* const kFloatSets[] = {&neon_bf16_kernels, &neon_kernels, &portable_kernels};

#else

bool runs_here(const Kernels&) { return true; }

const Kernels* const kFloatSets[] = {&portable_kernels};

#endif

std::atomic<const Kernels*> selected_floats{nullptr};

}  // namespace

const Kernels& kernels() { return selected_of(selected_floats, kFloatSets, runs_here); }

}  // namespace deit

extern "C" {

// The set in use: "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon" or "portable".
DEIT_EXPORT const char* deit_cpu_isa() { return deit::kernels().name; }

DEIT_EXPORT int deit_cpu_select_isa(const char* name) {
  return deit::select(deit::selected_floats, deit::kFloatSets, deit::runs_here, name);
}

}  // extern "C"
