// Which instruction set runs here: a library's sets, the best of them that this processor has, and
// the one that was selected. dispatch.cpp asks for floating point, int8_dispatch.cpp for 8 bits.
#pragma once

#include <atomic>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

// For `deit info` and the tests, which call what bears this through ctypes.
#define DEIT_EXPORT __attribute__((visibility("default")))

namespace deit {

#if defined(__x86_64__) || defined(_M_X64)

inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

#endif

#if defined(__aarch64__) && defined(__linux__)

// NEON is in all of these. The bits are HWCAP_ASIMDDP, HWCAP2_I8MM and HWCAP2_BF16 of the kernel,
// names that older headers lack.
inline bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
inline bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
inline bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }

#endif

// The set that was selected, or else the best one, which is selected with that.
// runs_here: whether this processor has a set's instructions.
template <class Set, size_t N>
const Set& selected_of(std::atomic<const Set*>& selected, const Set* const (&sets)[N],
                       bool (*runs_here)(const Set&)) {
  const Set* set = selected.load(std::memory_order_relaxed);
  if (set == nullptr) {
    size_t i = 0;
    while (i + 1 < N && !runs_here(*sets[i])) ++i;
    set = sets[i];
    selected.store(set, std::memory_order_relaxed);
  }
  return *set;
}

// Use the set called `name` from now on, or the best one for an empty name. 0: done; 1: no such
// set in this library; 2: this processor cannot run it.
template <class Set, size_t N>
int select(std::atomic<const Set*>& selected, const Set* const (&sets)[N],
           bool (*runs_here)(const Set&), const char* name) {
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

}  // namespace deit
