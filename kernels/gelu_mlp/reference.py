"""The MLP in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deit.kernels.layer_norm.reference import add_residual
from deit.kernels.linear.reference import activate


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    """residual + keep * gamma * (act(x w1T + b1) w2T + b2), act the exact (erf) GELU for None."""
    hidden = activate(F.linear(x, w1, b1), activation or "gelu")
    return add_residual(F.linear(hidden, w2, b2), residual, gamma, keep)
