// Which instruction set runs here.
#include <atomic>
#include <cstring>

#include "isa.h"

namespace deit {
namespace {

bool runs_here(const Kernels& set) {
#if defined(__x86_64__) || defined(_M_X64)
  if (&set == &avx512_bf16_kernels) {
    return runs_here(avx512_kernels) && __builtin_cpu_supports("avx512bf16");
  }
  if (&set == &avx512_kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
  if (&set == &avx2_kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return &set == &portable_kernels;
}

// The fastest first.
const Kernels* const kSets[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &avx512_bf16_kernels,
    &avx512_kernels,
    &avx2_kernels,
#endif
    &portable_kernels,
};

const Kernels* best() {
  for (const Kernels* set : kSets) {
    if (runs_here(*set)) return set;
  }
  return &portable_kernels;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* set = selected.load(std::memory_order_relaxed);
  if (set == nullptr) {
    set = best();
    selected.store(set, std::memory_order_relaxed);
  }
  return *set;
}

}  // namespace deit

// For `deit info` and the tests, which call them through ctypes.
#define DEIT_EXPORT __attribute__((visibility("default")))

extern "C" {

// "avx512_bf16", "avx512", "avx2" or "portable": the set in use.
DEIT_EXPORT const char* deit_cpu_isa() { return deit::kernels().name; }

// Use the set called `name` from now on, or the best one for an empty name. 0: done; 1: no such
// set in this library; 2: this processor cannot run it.
DEIT_EXPORT int deit_cpu_select_isa(const char* name) {
  if (name[0] == '\0') {
    deit::selected.store(nullptr, std::memory_order_relaxed);
    return 0;
  }
  for (const deit::Kernels* set : deit::kSets) {
    if (std::strcmp(set->name, name) != 0) continue;
    if (!deit::runs_here(*set)) return 2;
    deit::selected.store(set, std::memory_order_relaxed);
    return 0;
  }
  return 1;
}

}  // extern "C"
