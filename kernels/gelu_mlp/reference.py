"""The MLP in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deit.kernels.layer_norm.reference import add_residual


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """residual + keep * gamma * (gelu(x w1T + b1) w2T + b2), the exact (erf) GELU."""
    hidden = F.gelu(F.linear(x, w1, b1))
    return add_residual(F.linear(hidden, w2, b2), residual, gamma, keep)
