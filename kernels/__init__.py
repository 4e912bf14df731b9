"""The fused operators of DeiT: `from deit.kernels import attention, gelu_mlp`."""

# ruff: noqa: I001 - operators are listed as they are imported: in a network's order

if __name__ == "kernels":  # found from the repository's root instead of the PyPI package
    from .shadow import hand_over

    hand_over(__name__, __path__)
else:
    from deit.kernels.layer_norm import add_layer_norm, layer_norm, rms_norm
    from deit.kernels.attention import attention, rotary_attention
    from deit.kernels.cross_attention import cross_attention
    from deit.kernels.linear import linear
    from deit.kernels.gelu_mlp import gelu_mlp
    from deit.kernels.gelu_mlp.gated import glu_mlp
    from deit.kernels.vit_block import vit_block
    from deit.kernels.patch_embed import patch_embed
    from deit.kernels.losses import cross_entropy, distillation_loss
    from deit.kernels.int8 import int8_gelu_mlp, int8_linear, int8_vit_block
    from deit.kernels.fp8 import fp8_gelu_mlp, fp8_linear
    from deit.kernels.engine.dispatch import Explanation, explain
    from deit.kernels.engine.warmup import warmup
    from deit.kernels import thirds as thirds

__all__ = [
    "Explanation",
    "add_layer_norm",
    "attention",
    "cross_attention",
    "cross_entropy",
    "distillation_loss",
    "explain",
    "fp8_gelu_mlp",
    "fp8_linear",
    "gelu_mlp",
    "glu_mlp",
    "int8_gelu_mlp",
    "int8_linear",
    "int8_vit_block",
    "layer_norm",
    "linear",
    "patch_embed",
    "rms_norm",
    "rotary_attention",
    "vit_block",
    "warmup",
]
