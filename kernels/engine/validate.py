"""Checks shared by the public operators; each error names the argument, the need and the value."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def tensor(name: str, value: object, *, rank: int | None = None, min_rank: int = 1) -> None:
    """`value` is a floating-point tensor of that rank, neither nested nor sparse."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor; got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a tensor that is not nested; got {value.layout}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor; got {value.layout}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype; got {value.dtype}")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name}: expected rank {rank}; got shape {tuple(value.shape)}")
    if value.dim() < min_rank:
        raise ValueError(f"{name}: expected rank >= {min_rank}; got shape {tuple(value.shape)}")


def present(**values: object) -> None:
    """None of them is None; `parameters` checks the rest."""
    for name, value in values.items():
        if value is None:
            raise TypeError(f"{name}: expected a Tensor; got NoneType")


def heads(name: str, x: Tensor, num_heads: object, parts: int = 1) -> int:
    """D of x [..., parts * D], a positive multiple of a positive number of heads."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads: expected a positive integer; got {num_heads!r}")
    channels = x.shape[-1]
    if channels % (parts * num_heads) or channels == 0:
        axis = "that is" if parts == 1 else f"of {parts} * D with D"
        raise ValueError(
            f"{name}: expected a last axis {axis} a multiple of num_heads={num_heads}; "
            f"got shape {tuple(x.shape)}"
        )
    return channels // parts


def rows(name: str, value: object) -> int:
    """M of `value`, a weight [M, K]; `parameters` checks its dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor; got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(f"{name}: expected rank 2; got shape {tuple(value.shape)}")
    return value.shape[0]


def parameters(
    like: Tensor,
    *expected: tuple[str, Tensor | None, tuple[int, ...]],
    fp32_allowed: bool = False,
) -> None:
    """Each (name, value, shape): a value has this shape and `like`'s dtype and device, or is None.

    With `fp32_allowed`, fp32 is accepted beside half-precision `like` (norms, gamma, keep). All
    in one call, because a tensor makes its dtype and its device anew when it is asked: 0.4 us a
    parameter became 0.25.
    """
    dtype, device = like.dtype, like.device
    for name, value, shape in expected:
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor; got {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}; got {tuple(value.shape)}")
        found = value.dtype
        if found != dtype and not (fp32_allowed and found == torch.float32):
            allowed = f"{dtype} or torch.float32" if fp32_allowed else f"{dtype}"
            raise TypeError(f"{name}: expected {allowed}, as the input's; got {found}")
        if value.device != device:
            raise ValueError(f"{name}: expected on {device}, as the input; got {value.device}")


def number(name: str, value: Any) -> float:
    """`value` as a finite float."""
    if type(value) is float:  # nearly always, and an abstract class takes 0.3 us to answer
        found = value
    elif isinstance(value, (bool, Tensor)) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number; got {type(value).__name__}")
    else:
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
    if keep is not None and len(shape) < 2:
        raise ValueError(f"keep: expected an input with a batch axis; got shape {shape}")
    parameters(
        x,
        ("residual", residual, shape),
        ("gamma", gamma, shape[-1:]),
        ("keep", keep, shape[:1]),
        fp32_allowed=True,
    )
