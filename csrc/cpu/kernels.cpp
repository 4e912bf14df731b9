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
#include "block.inl"

// Training, over what those define. clang-format off
#include "lanes.inl"
#include "gelu.inl"
#include "gemm.inl"
#include "weight_gradient.inl"
#include "attention_bwd.inl"
#include "layer_norm_bwd.inl"

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
    DEIT_ISA::products::kCols,
    DEIT_ISA::products::pack_weight,
    DEIT_ISA::blocks::block_workspace,
    DEIT_ISA::blocks::block,
    DEIT_ISA::blocks::row_stats,
    {
        DEIT_ISA::kPanel,
        DEIT_ISA::kRowTile,
        DEIT_ISA::pack_operand,
        DEIT_ISA::product_workspace,
        DEIT_ISA::product_tiles,
        DEIT_ISA::weight_gradient_workspace,
        DEIT_ISA::weight_gradient,
        DEIT_ISA::output_gradient,
        DEIT_ISA::layer_norm_gradient,
        DEIT_ISA::plan_attention_gradient,
        DEIT_ISA::attention_gradient_workspace,
        DEIT_ISA::attention_gradient,
    },
};

}  // namespace deit
