"""Products in 8-bit integers in plain PyTorch: the arithmetic that the kernels must reproduce.

Integers are held in fp64, where every sum of products up to a depth of 2**37 is exact.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deit.kernels.attention.reference import attention
from deit.kernels.engine import eight_bits
from deit.kernels.engine.eight_bits import joined, normalised
from deit.kernels.int8.quantize import quantize_channels, quantize_tokens
from deit.kernels.vit_block.arguments import BlockArguments


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wT + bias with both factors in 8 bits."""
    integers, zero, token_scales = quantize_tokens(x)
    channels, channel_scales = quantize_channels(weight)
    exact = (integers.double() - zero.double()) @ channels.double().T
    y = exact.to(x.dtype) * (token_scales * channel_scales)
    return y if bias is None else y + bias


def int8_linear(*arguments: Any) -> Tensor:
    """residual + gamma * act(LN(x) wT + bias), the product in 8 bits."""
    return eight_bits.linear(_product, *arguments)


def int8_gelu_mlp(*arguments: Any) -> Tensor:
    """residual + gamma * (gelu(LN(x) w1T + b1) w2T + b2), both products in 8 bits."""
    return eight_bits.gelu_mlp(_product, *arguments)


def int8_vit_block(x: Tensor, *others: Any) -> Tensor:
    """s = x + gamma1 * proj(attention(qkv(LN(x)))); s + gamma2 * fc2(gelu(fc1(LN(s))))."""
    b = BlockArguments(x, None, *others)
    normed = normalised(x, b.norm1_weight, b.norm1_bias, b.eps)
    qkv = _product(normed, b.qkv_weight, b.qkv_bias)
    mixed = attention(qkv, b.num_heads, b.scale, b.key_bias)
    stream = joined(_product(mixed, b.proj_weight, b.proj_bias), x, b.gamma1)
    norm = (b.norm2_weight, b.norm2_bias, b.eps)
    return int8_gelu_mlp(stream, b.w1, b.b1, b.w2, b.b2, *norm, stream, b.gamma2)
