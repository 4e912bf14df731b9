"""LayerNorm in plain PyTorch, alone and after an addition, and RMSNorm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_residual(
    y: Tensor, residual: Tensor | None, gamma: Tensor | None, keep: Tensor | None
) -> Tensor:
    """residual + keep * gamma * y, in the residual's dtype; y alone where all are None."""
    dtype = y.dtype if residual is None else residual.dtype
    if gamma is not None:
        y = y * gamma
    if keep is not None:
        y = y * keep.view(-1, *[1] * (y.dim() - 1))
    if residual is not None:
        y = residual + y
    return y.to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis (arXiv 1607.06450); statistics in at least fp32."""
    if weight.dtype != x.dtype:  # fp32 parameters beside half-precision activations
        return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis (arXiv 1910.07467); the mean square in at least fp32."""
    if weight.dtype != x.dtype:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(LN(s), s) with s = residual + keep * gamma * x; LN(s) in x's dtype, s in residual's."""
    total = add_residual(x, residual, gamma, keep)
    return layer_norm(total, weight, bias, eps).to(x.dtype), total
