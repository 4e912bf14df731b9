"""Schemas and fakes of LayerNorm (arXiv 1607.06450), alone and after a residual addition, and of
RMSNorm (arXiv 1910.07467).

gamma is LayerScale's (arXiv 2103.17239), keep stochastic depth's (arXiv 1603.09382); mean and rstd
are fp32. Of add_layer_norm's gradients only gamma's reads x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deit.kernels.engine.fakes import like, of_wanted
from deit.kernels.engine.registry import CSRC, define


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and rstd of every row."""
    rows = x.shape[:-1]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _norm_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape), *_statistics(x))


def _norm_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    return of_wanted(wanted, like(x, x), like(weight, x), like(weight, x))


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _rms_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    return of_wanted(wanted, like(x, x), like(weight, x))


def _add(x: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def _add_fwd(x: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape), residual.new_empty(x.shape), *_statistics(x))


def _add_bwd(
    dout: Tensor,
    dtotal: Tensor,
    x: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    dweight, dbias, dgamma = (like(t, weight) for t in (weight, weight, gamma))
    return of_wanted(wanted, like(dout, dout), like(total, total), dweight, dbias, dgamma)


_NORM = "Tensor x, Tensor weight, Tensor? bias, float eps"
_ADD = (
    "Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor? gamma, Tensor? keep"
)
_FORWARD, _BACKWARD = "layer_norm.triton", "layer_norm.triton_bwd"

define("layer_norm", f"({_NORM}) -> Tensor", _norm, cpu=CSRC, cuda=CSRC, triton=_FORWARD)
define(
    "layer_norm_fwd",
    f"({_NORM}) -> (Tensor out, Tensor mean, Tensor rstd)",
    _norm_fwd,
    cpu=CSRC,
    triton=_FORWARD,
)
define(
    "layer_norm_bwd",
    "(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool[]? wanted=None) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _norm_bwd,
    cpu=CSRC,
    triton=_BACKWARD,
)
define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms,
    cpu=CSRC,
    triton=_FORWARD,
)
define(
    "rms_norm_fwd",
    "(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor rstd)",
    _rms_fwd,
    cpu=CSRC,
    triton=_FORWARD,
)
define(
    "rms_norm_bwd",
    "(Tensor dout, Tensor x, Tensor weight, Tensor rstd, bool[]? wanted=None) "
    "-> (Tensor dx, Tensor dweight)",
    _rms_bwd,
    cpu=CSRC,
    triton=_BACKWARD,
)
define(
    "add_layer_norm", f"({_ADD}) -> (Tensor, Tensor)", _add, cpu=CSRC, cuda=CSRC, triton=_FORWARD
)
define(
    "add_layer_norm_fwd",
    f"({_ADD}) -> (Tensor out, Tensor total, Tensor mean, Tensor rstd)",
    _add_fwd,
    cpu=CSRC,
    triton=_FORWARD,
)
define(
    "add_layer_norm_bwd",
    "(Tensor dout, Tensor dtotal, Tensor? x, Tensor total, Tensor weight, Tensor mean, "
    "Tensor rstd, Tensor? gamma, Tensor? keep, bool[]? wanted=None) -> (Tensor dx, "
    "Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dgamma)",
    _add_bwd,
    cpu=CSRC,
    triton=_BACKWARD,
)
