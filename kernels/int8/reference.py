"""Products in 8-bit integers in plain PyTorch: the arithmetic that the kernels must reproduce.

Integers are held in fp64, where every sum of products up to a depth of 2**37 is exact.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deit.kernels.attention.reference import attention
from deit.kernels.int8.quantize import quantize_channels, quantize_tokens


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wT + bias with both factors in 8 bits."""
    integers, zero, token_scales = quantize_tokens(x)
    channels, channel_scales = quantize_channels(weight)
    exact = (integers.double() - zero.double()) @ channels.double().T
    y = exact.to(x.dtype) * (token_scales * channel_scales)
    return y if bias is None else y + bias


def _normalised(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    if norm_weight is None:
        return x
    return F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)


def _joined(y: Tensor, residual: Tensor | None, gamma: Tensor | None) -> Tensor:
    y = y if gamma is None else y * gamma
    return y if residual is None else residual + y


def int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Tensor:
    """residual + gamma * act(LN(x) wT + bias), the product in 8 bits."""
    y = _product(_normalised(x, norm_weight, norm_bias, eps), weight, bias)
    return _joined(F.gelu(y) if gelu else y, residual, gamma)


def int8_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Tensor:
    """residual + gamma * (gelu(LN(x) w1T + b1) w2T + b2), both products in 8 bits."""
    hidden = F.gelu(_product(_normalised(x, norm_weight, norm_bias, eps), w1, b1))
    return _joined(_product(hidden, w2, b2), residual, gamma)


def int8_vit_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma2: Tensor | None,
    key_bias: Tensor | None,
    num_heads: int,
    scale: float,
    eps: float,
) -> Tensor:
    """s = x + gamma1 * proj(attention(qkv(LN(x)))); s + gamma2 * fc2(gelu(fc1(LN(s))))."""
    qkv = _product(_normalised(x, norm1_weight, norm1_bias, eps), qkv_weight, qkv_bias)
    mixed = attention(qkv, num_heads, scale, key_bias)
    stream = _joined(_product(mixed, proj_weight, proj_bias), x, gamma1)
    return int8_gelu_mlp(stream, w1, b1, w2, b2, norm2_weight, norm2_bias, eps, stream, gamma2)
