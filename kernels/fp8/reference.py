"""Products in e4m3 in plain PyTorch: the arithmetic that the kernels must reproduce.

Everything but the rounding to e4m3 is fp32, whatever x's dtype; the result is rounded to that once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deit.kernels.fp8.quantize import GROUP, rounded


def _wide(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wT + bias with both factors in e4m3, x [..., K] in fp32; summed in fp32."""
    return F.linear(rounded(x, GROUP), rounded(weight, weight.shape[1]), _wide(bias))


def _normalised(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    if norm_weight is None:
        return x.float()
    return F.layer_norm(x.float(), norm_weight.shape, norm_weight.float(), _wide(norm_bias), eps)


def _joined(y: Tensor, residual: Tensor | None, gamma: Tensor | None) -> Tensor:
    y = y if gamma is None else y * gamma.float()
    return y if residual is None else residual.float() + y


def fp8_linear(
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
    """residual + gamma * act(LN(x) wT + bias), the product in e4m3."""
    y = _product(_normalised(x, norm_weight, norm_bias, eps), weight, bias)
    return _joined(F.gelu(y) if gelu else y, residual, gamma).to(x.dtype)


def fp8_gelu_mlp(
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
    """residual + gamma * (gelu(LN(x) w1T + b1) w2T + b2), both products in e4m3."""
    hidden = F.gelu(_product(_normalised(x, norm_weight, norm_bias, eps), w1, b1))
    return _joined(_product(hidden, w2, b2), residual, gamma).to(x.dtype)
