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

// Shared, in the order in which they build on each other. clang-format off
#include "lanes.inl"
#include "gelu.inl"
#include "outer_product.inl"

#include "layer_norm.inl"
#include "layer_norm_bwd.inl"
#include "attention.inl"
#include "attention_bwd.inl"
#include "cross_attention.inl"
#include "linear.inl"
#include "gelu_mlp.inl"
#include "linear_training.inl"
#include "linear_bwd.inl"
#include "losses.inl"
#include "vit_block.inl"
// clang-format on

}  // namespace
}  // namespace DEIT_ISA

const Kernels DEIT_TABLE(DEIT_ISA) = {
    DEIT_TEXT(DEIT_ISA),
    DEIT_ISA::layer_norm_kernels,
    DEIT_ISA::attention_kernels,
    DEIT_ISA::cross_attention_kernels,
    DEIT_ISA::products::kernels,
    DEIT_ISA::training_product_kernels,
    DEIT_ISA::linear_gradient_kernels,
    DEIT_ISA::loss_kernels,
    DEIT_ISA::blocks::kernels,
};

}  // namespace deit
