// One instruction set's products in 8-bit integers. Compiled once per set, as kernels.cpp is.
#include "int8.h"
#include "int8_simd.h"

#define DEIT_TABLE_NAME(isa) isa##_int8
#define DEIT_TABLE(isa) DEIT_TABLE_NAME(isa)
#define DEIT_TEXT_OF(isa) #isa
#define DEIT_TEXT(isa) DEIT_TEXT_OF(isa)

namespace deit {
namespace DEIT_ISA {
namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"  // only its arithmetic of a row is used
#include "gelu.inl"
#include "lanes.inl"
#include "layer_norm.inl"
#pragma GCC diagnostic pop

#include "int8_linear.inl"

}  // namespace
}  // namespace DEIT_ISA

const Int8Kernels DEIT_TABLE(DEIT_ISA) = {
    DEIT_TEXT(DEIT_ISA),
    DEIT_ISA::kGroup,
    DEIT_ISA::kMostRows / DEIT_ISA::kGroup,
    DEIT_ISA::int8_workspace,
    DEIT_ISA::run_int8,
};

}  // namespace deit
