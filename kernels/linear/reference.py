"""A linear layer with its epilogues in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deit.kernels.layer_norm.reference import add_residual


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """residual + keep * gamma * act(x wT + bias)."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return add_residual(y, residual, gamma, keep)
