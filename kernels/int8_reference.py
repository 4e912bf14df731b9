"""Products in 8-bit integers in plain PyTorch: the arithmetic that the kernels must reproduce.

Weights are symmetric with a scale an output channel (arXiv 1806.08342, section 2.2); activations
have a scale and a zero point a token, from the token's own range. Integers are held in fp64, where
every sum of products up to a depth of 2**37 is exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-37  # a scale below: 1 / scale would overflow in fp32


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [M, K] -> (int8 [M, K] in -127..127, scales [M]); weight ~ scales[:, None] * int8.

    A channel with NaN or an infinity has the scale NaN.
    """
    largest = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(len(weight))
    scales = largest / 127
    usable = scales.isfinite() & (scales > _TINY)
    inverse = torch.where(usable, 1 / scales, 0.0)
    integers = torch.where(usable[:, None], weight * inverse[:, None], 0.0)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return integers.round_().clamp_(-127, 127).to(torch.int8), scales


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] -> (integers in 0..255, zero points [..., 1], scales [..., 1]), all in x's dtype.

    x ~ scales * (integers - zero). 0 is always represented, exactly. A token with NaN or an
    infinity has the scale NaN.
    """
    low = x.amin(dim=-1, keepdim=True).clamp(max=0.0)
    high = x.amax(dim=-1, keepdim=True).clamp(min=0.0)
    scales = (high - low) / 255
    usable = scales.isfinite() & (scales > _TINY)
    inverse = torch.where(usable, 1 / scales, 0.0)
    zero = (-low * inverse).round()
    integers = ((x * inverse).round() + zero).clamp(0, 255)
    good = x.isfinite().all(dim=-1, keepdim=True)
    integers, zero = integers.nan_to_num(0.0), zero.nan_to_num(0.0)
    return integers, zero, torch.where(good, scales, torch.nan)


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
