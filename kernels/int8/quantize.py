"""From floating point to 8-bit integers, as every implementation of their products rounds.

Weights are symmetric with a scale an output channel (arXiv 1806.08342, section 2.2); activations
have a scale and a zero point a token, from the token's own range.
"""

from __future__ import annotations

import torch
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
