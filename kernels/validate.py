"""Checks shared by the public operators; each error names the argument, the need and the value."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def tensor(name: str, value: object, *, rank: int | None = None, min_rank: int = 1) -> None:
    """`value` is a floating-point tensor of that rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype; got {value.dtype}")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name}: expected rank {rank}; got shape {tuple(value.shape)}")
    if value.dim() < min_rank:
        raise ValueError(f"{name}: expected rank >= {min_rank}; got shape {tuple(value.shape)}")


def parameter(
    name: str,
    value: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    *,
    fp32_allowed: bool = False,
) -> None:
    """`value` has this shape and lives where and in the dtype in which `like` does.

    With `fp32_allowed`, fp32 is accepted beside half-precision `like` (norms, gamma, keep).
    """
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor; got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}; got {tuple(value.shape)}")
    if value.dtype != like.dtype and not (fp32_allowed and value.dtype == torch.float32):
        allowed = f"{like.dtype} or torch.float32" if fp32_allowed else f"{like.dtype}"
        raise TypeError(f"{name}: expected {allowed}, as the input's; got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, as the input; got {value.device}")


def number(name: str, value: Any) -> float:
    """`value` as a finite float."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number; got {type(value).__name__}")
    found = float(value)
    if not -math.inf < found < math.inf:
        raise ValueError(f"{name}: expected a finite number; got {value}")
    return found


def epilogue(
    x: Tensor,
    width: int,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> None:
    """For an output [..., width] of x's leading axes: a residual of that shape, gamma [width]
    (LayerScale), keep [B] (stochastic depth)."""
    if residual is None and gamma is None and keep is None:
        return
    shape = (*x.shape[:-1], width)
    if residual is not None:
        parameter("residual", residual, shape, x, fp32_allowed=True)
    if gamma is not None:
        parameter("gamma", gamma, shape[-1:], x, fp32_allowed=True)
    if keep is not None:
        if len(shape) < 2:
            raise ValueError(f"keep: expected an input with a batch axis; got shape {shape}")
        parameter("keep", keep, shape[:1], x, fp32_allowed=True)
