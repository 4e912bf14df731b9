// The cases: each draws one problem of a kernel, runs it by `run`, and checks what it wrote.
#pragma once

#include "../../csrc/cpu/isa.h"

namespace fuzz {

class Random;

void fuzz_shares(Random& random, const deit::Kernels& set);
void fuzz_team(Random& random, const deit::Kernels& set);
void fuzz_lanes(Random& random, const deit::Kernels& set);
void fuzz_layer_norm(Random& random, const deit::Kernels& set);
void fuzz_attention(Random& random, const deit::Kernels& set);
void fuzz_cross_attention(Random& random, const deit::Kernels& set);
void fuzz_product(Random& random, const deit::Kernels& set);
void fuzz_block(Random& random, const deit::Kernels& set);
void fuzz_int8(Random& random, const deit::Kernels& set);
void fuzz_attention_gradient(Random& random, const deit::Kernels& set);
void fuzz_weight_gradient(Random& random, const deit::Kernels& set);
void fuzz_training_product(Random& random, const deit::Kernels& set);
void fuzz_output_gradient(Random& random, const deit::Kernels& set);
void fuzz_layer_norm_gradient(Random& random, const deit::Kernels& set);
void fuzz_losses(Random& random, const deit::Kernels& set);

}  // namespace fuzz
