"""A fused block with its four products in 8-bit integers, for `fuse(model, dtype="int8")`.

LayerNorm, softmax, GELU, LayerScale and the residual stream stay fp32, and so do the patch
embedding and the heads. The parameters stay what they were: the int8 weights are copies that
`deit.kernels.packing` keeps while a weight does not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deit.kernels import attention, int8_gelu_mlp, int8_linear, int8_vit_block

WHOLE = "int8_vit_block"
OPERATORS = ("int8_linear", "int8_gelu_mlp", WHOLE)
REMARK = "in eval qkv, proj, fc1, fc2 in int8; norms, softmax, GELU, residual in fp32"


def refuse(model: nn.Module) -> None:
    """Raises ValueError where `model` is not fp32 on a CPU."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(
                f"dtype: 'int8' expects fp32 parameters on a CPU; {name} is {parameter.dtype} on "
                f"{parameter.device}"
            )


def asked(impls: dict[str, str]) -> bool:
    """Whether fuse() was asked for int8: only then do `impls` name its operators."""
    return OPERATORS[0] in impls


def advance(block: Any, x: Tensor, key_bias: Tensor | None, rows: int | None) -> Tensor:
    """`FusedBlock.advance` with the products in int8: [B, N, D] -> [B, N or rows, D].

    Raises NotImplementedError for x that is not fp32 on a CPU, and where a gradient is wanted.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise NotImplementedError(
            f"a block fused with dtype='int8' takes fp32 tokens on a CPU; got {x.dtype} on "
            f"{x.device}: unfuse the model, or fuse it again without dtype"
        )
    norm1, attn, norm2, mlp = block.parts()
    impls = block.fused_impls
    if rows is None and WHOLE in impls and norm1.eps == norm2.eps:
        return int8_vit_block(x, **block.arguments(WHOLE), key_bias=key_bias)
    norm = (norm1.weight, norm1.bias, norm1.eps)

    def project(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return int8_linear(tokens, weight, bias, norm=norm, impl=impls["int8_linear"])

    weight, bias = attn.projection()
    stream = x if rows is None else x[:, :rows]
    if rows is None:
        heads, scale = attn.geometry()
        qkv = project(x, weight, bias)
        mixed = attention(qkv, heads, scale=scale, key_bias=key_bias, impl=impls["attention"])
    else:
        mixed = attn.mix_prefix(x, rows, weight, bias, project)
    proj = attn.output()
    stream = int8_linear(
        mixed.to(x.dtype),  # autocast's, if it is on
        proj.weight,
        proj.bias,
        residual=stream,
        gamma=block.gamma(0),
        impl=impls["int8_linear"],
    )
    fc1, fc2 = (mlp._modules[name] for name in mlp.LINEARS)
    return int8_gelu_mlp(
        stream,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        norm=(norm2.weight, norm2.bias, norm2.eps),
        residual=stream,
        gamma=block.gamma(1),
        impl=impls["int8_gelu_mlp"],
    )
