"""Schemas and fakes of a linear layer with its epilogues.

GELU is arXiv 1606.08415's, gamma LayerScale's (arXiv 2103.17239), keep stochastic depth's (arXiv
1603.09382). `affine` is the product before them. It is saved and read for gamma's gradient and,
behind an activation, for every gradient. Only the weight's gradient reads x.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deit.kernels.engine.fakes import like, of_wanted, projected, through
from deit.kernels.engine.registry import CSRC, define


def _linear(
    x: Tensor, weight: Tensor, bias: object, activation: object, residual: Tensor | None, *_: object
) -> Tensor:
    return projected(x, weight.shape[0], residual)


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: object,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: object,
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape[:-1], weight.shape[0]
    saved = activation is not None or gamma is not None
    return projected(x, width, residual), x.new_empty((*rows, width) if saved else 0)


def _bwd(
    dout: Tensor,
    x: Tensor | None,
    weight: Tensor,
    affine: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    dx, dbias = through(dout, weight), weight.new_empty(weight.shape[0])
    return of_wanted(wanted, dx, like(weight, weight), dbias, like(gamma, weight))


_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, Tensor? gamma, "
    "Tensor? keep"
)
_FORWARD, _BACKWARD = "linear.triton", "linear.triton_bwd"

define(
    "linear",
    f"({_INPUTS}) -> Tensor",
    _linear,
    cpu=CSRC,
    cuda=CSRC,
    cublaslt=CSRC,
    triton=_FORWARD,
)
define("linear_fwd", f"({_INPUTS}) -> (Tensor out, Tensor affine)", _fwd, cpu=CSRC, triton=_FORWARD)
define(
    "linear_bwd",
    "(Tensor dout, Tensor? x, Tensor weight, Tensor? affine, str? activation, Tensor? gamma, "
    "Tensor? keep, bool[]? wanted=None) -> (Tensor dx, Tensor dweight, Tensor dbias, "
    "Tensor dgamma)",
    _bwd,
    cpu=CSRC,
    triton=_BACKWARD,
)
