"""A linear layer with its epilogues in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.layer_norm.reference import add_residual


def activate(y: Tensor, activation: str | None) -> Tensor:
    """y after `linear`'s activation, or y for None."""
    if activation is None:
        return y
    if activation == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    if activation == "silu":
        return F.silu(y)
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


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
    y = activate(F.linear(x, weight, bias), activation)
    return add_residual(y, residual, gamma, keep)
