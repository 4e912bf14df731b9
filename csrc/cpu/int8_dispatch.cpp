// Which instruction set the kernels in 8 bits run by.
#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#include "dispatch.h"
#include "int8.h"

namespace deit {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

bool has_avxvnni() {  // not __builtin_cpu_supports, which names it only from GCC 11 and clang 17 on
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1u);
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
const Int8Kernels* const kInt8Sets[] = {&avx512vnni_int8, &avxvnni_int8, &avx2_int8,
                                        &portable_int8};

#elif defined(__aarch64__) && defined(__linux__)

bool runs_here(const Int8Kernels& set) {
  if (&set == &neon_i8mm_int8) return has_i8mm();
  if (&set == &neon_dotprod_int8) return has_dotprod();
  return true;
}

const Int8Kernels* const kInt8Sets[] = {&neon_i8mm_int8, &neon_dotprod_int8, &neon_int8,
                                        &portable_int8};

#else

bool runs_here(const Int8Kernels&) { return true; }

const Int8Kernels* const kInt8Sets[] = {&portable_int8};

#endif

std::atomic<const Int8Kernels*> selected_int8{nullptr};

}  // namespace

const Int8Kernels& int8_kernels() { return selected_of(selected_int8, kInt8Sets, runs_here); }

}  // namespace deit

extern "C" {

// The set in use: "avx512vnni", "avxvnni", "avx2", "neon_i8mm", "neon_dotprod", "neon" or
// "portable".
DEIT_EXPORT const char* deit_cpu_int8_isa() { return deit::int8_kernels().name; }

DEIT_EXPORT int deit_cpu_select_int8_isa(const char* name) {
  return deit::select(deit::selected_int8, deit::kInt8Sets, deit::runs_here, name);
}

}  // extern "C"
