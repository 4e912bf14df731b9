// Which instruction set runs here: one for the floating-point kernels, one for those in 8 bits.
#include <atomic>
#include <cstring>
#include <iterator>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#include "int8.h"
#include "isa.h"

namespace deit {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

bool has_avxvnni() {  // not __builtin_cpu_supports, which names it only from GCC 11 and clang 17 on
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1u);
}

bool runs_here(const Kernels& set) {
  if (&set == &avx512_bf16_kernels) return has_avx512() && __builtin_cpu_supports("avx512bf16");
  if (&set == &avx512_kernels) return has_avx512();
  if (&set == &avx2_kernels) return has_avx2();
  return true;
}

bool runs_here(const Int8Kernels& set) {
  if (&set == &avx512vnni_int8) {
    return has_avx2() && has_avx512() && __builtin_cpu_supports("avx512vnni");
  }
  if (&set == &avxvnni_int8) return has_avx2() && has_avxvnni();
  if (&set == &avx2_int8) return has_avx2();
  return true;
}

// The fastest first.
const Kernels* const kFloatSets[] = {&avx512_bf16_kernels, &avx512_kernels, &avx2_kernels,
                                     &portable_kernels};
const Int8Kernels* const kInt8Sets[] = {&avx512vnni_int8, &avxvnni_int8, &avx2_int8,
                                        &portable_int8};

#else

template <class Set>
bool runs_here(const Set&) {
  return true;
}

const Kernels* const kFloatSets[] = {&portable_kernels};
const Int8Kernels* const kInt8Sets[] = {&portable_int8};

#endif

std::atomic<const Kernels*> selected_floats{nullptr};
std::atomic<const Int8Kernels*> selected_int8{nullptr};

// The set that was selected, or else the best one, which this selects.
template <class Set, size_t N>
const Set& selected_of(std::atomic<const Set*>& selected, const Set* const (&sets)[N]) {
  const Set* set = selected.load(std::memory_order_relaxed);
  if (set == nullptr) {
    size_t i = 0;
    while (i + 1 < N && !runs_here(*sets[i])) ++i;
    set = sets[i];
    selected.store(set, std::memory_order_relaxed);
  }
  return *set;
}

template <class Set, size_t N>
int select(std::atomic<const Set*>& selected, const Set* const (&sets)[N], const char* name) {
  if (name[0] == '\0') {
    selected.store(nullptr, std::memory_order_relaxed);
    return 0;
  }
  for (const Set* set : sets) {
    if (std::strcmp(set->name, name) != 0) continue;
    if (!runs_here(*set)) return 2;
    selected.store(set, std::memory_order_relaxed);
    return 0;
  }
  return 1;
}

}  // namespace

const Kernels& kernels() { return selected_of(selected_floats, kFloatSets); }
const Int8Kernels& int8_kernels() { return selected_of(selected_int8, kInt8Sets); }

}  // namespace deit

// For `deit info` and the tests, which call them through ctypes.
#define DEIT_EXPORT __attribute__((visibility("default")))

extern "C" {

// The set in use: "avx512_bf16", "avx512", "avx2" or "portable"; and in 8 bits "avx512vnni",
// "avxvnni", "avx2" or "portable".
DEIT_EXPORT const char* deit_cpu_isa() { return deit::kernels().name; }
DEIT_EXPORT const char* deit_cpu_int8_isa() { return deit::int8_kernels().name; }

// Use the set called `name` from now on, or the best one for an empty name. 0: done; 1: no such
// set in this library; 2: this processor cannot run it.
DEIT_EXPORT int deit_cpu_select_isa(const char* name) {
  return deit::select(deit::selected_floats, deit::kFloatSets, name);
}
DEIT_EXPORT int deit_cpu_select_int8_isa(const char* name) {
  return deit::select(deit::selected_int8, deit::kInt8Sets, name);
}

}  // extern "C"
