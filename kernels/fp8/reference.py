"""Products in e4m3 in plain PyTorch: the arithmetic that the kernels must reproduce.

Everything but the rounding to e4m3 is fp32, whatever x's dtype; the result is rounded to that once.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deit.kernels.engine import eight_bits
from deit.kernels.fp8.quantize import GROUP, rounded


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wT + bias with both factors in e4m3, x [..., K] in fp32; summed in fp32."""
    return F.linear(rounded(x, GROUP), rounded(weight, weight.shape[1]), bias)


def _wide(arguments: tuple[Any, ...]) -> list[Any]:
    return [each.float() if isinstance(each, Tensor) else each for each in arguments]


def fp8_linear(x: Tensor, *others: Any) -> Tensor:
    """residual + gamma * act(LN(x) wT + bias), the product in e4m3."""
    return eight_bits.linear(_product, *_wide((x, *others))).to(x.dtype)


def fp8_gelu_mlp(x: Tensor, *others: Any) -> Tensor:
    """residual + gamma * (gelu(LN(x) w1T + b1) w2T + b2), both products in e4m3."""
    return eight_bits.gelu_mlp(_product, *_wide((x, *others))).to(x.dtype)
