// One instruction set's kernels. Compiled once per set, with its flags and DEIT_ISA=<its name>.
#include "isa.h"
#include "simd.h"

#define DEIT_TABLE_NAME(isa) isa##_kernels
#define DEIT_TABLE(isa) DEIT_TABLE_NAME(isa)
#define DEIT_TEXT_OF(isa) #isa
#define DEIT_TEXT(isa) DEIT_TEXT_OF(isa)

namespace deit {
namespace DEIT_ISA {
namespace {

#include "attention.inl"
#include "layer_norm.inl"
#include "product.inl"

}  // namespace
}  // namespace DEIT_ISA

const Kernels DEIT_TABLE(DEIT_ISA) = {
    DEIT_TEXT(DEIT_ISA),
    DEIT_ISA::layer_norm_workspace,
    DEIT_ISA::layer_norm,
    DEIT_ISA::plan_attention,
    DEIT_ISA::attention_workspace,
    DEIT_ISA::attention,
    DEIT_ISA::products::plan_product,
    DEIT_ISA::products::product_workspace,
    DEIT_ISA::products::product,
};

}  // namespace deit
