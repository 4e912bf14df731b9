// The schemas of the operators in deit_cpu; see schemas.h.
#include "schemas.h"

// 0: they are defined now, or were by an earlier call. 1: someone else had defined one of them,
// deit.kernels in Python as a rule, and torch refuses it.
extern "C" DEIT_EXPORT int deit_cpu_define_schemas() {
  static const deit::Schemas defined("deit_cpu", {
#include "cpu.inl"
                                                });
  return defined.refused();
}
