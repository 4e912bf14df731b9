"""Every operator in plain PyTorch: the definition of what each kernel must compute.

These run in any float dtype, fp64 included, on any device, and differentiate by autograd. They
are the oracle of the tests (in fp64), the yardstick of the error rule (in the kernel's own
dtype), and what runs where no kernel does. Arguments are those of the operator's schema, in order.
Each operator's folder holds its own; here they are by name, for whoever compares with them.
"""

from deit.kernels.attention.reference import attention as attention
from deit.kernels.fp8.reference import fp8_gelu_mlp as fp8_gelu_mlp
from deit.kernels.fp8.reference import fp8_linear as fp8_linear
from deit.kernels.gelu_mlp.reference import gelu_mlp as gelu_mlp
from deit.kernels.int8.reference import int8_gelu_mlp as int8_gelu_mlp
from deit.kernels.int8.reference import int8_linear as int8_linear
from deit.kernels.int8.reference import int8_vit_block as int8_vit_block
from deit.kernels.layer_norm.reference import add_layer_norm as add_layer_norm
from deit.kernels.layer_norm.reference import layer_norm as layer_norm
from deit.kernels.linear.reference import linear as linear
from deit.kernels.losses.reference import cross_entropy as cross_entropy
from deit.kernels.losses.reference import distillation_loss as distillation_loss
from deit.kernels.patch_embed.reference import patch_embed as patch_embed
from deit.kernels.vit_block.reference import row_stats as row_stats
from deit.kernels.vit_block.reference import vit_block as vit_block
