"""Schemas and fakes of the MLP; what its training saves and reads again is as for `linear`.

An activation of None is the exact GELU: a call of the usual kind hands no string over.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deit.kernels.engine.fakes import like, of_wanted, projected, through
from deit.kernels.engine.registry import CSRC, define


def _mlp(
    x: Tensor, w1: Tensor, b1: object, w2: Tensor, b2: object, residual: Tensor | None, *_: object
) -> Tensor:
    return projected(x, w2.shape[0], residual)


def _fwd(
    x: Tensor,
    w1: Tensor,
    b1: object,
    w2: Tensor,
    b2: object,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: object,
    activation: object = None,
) -> tuple[Tensor, ...]:
    rows, width = x.shape[:-1], w2.shape[0]
    affine = x.new_empty(0 if gamma is None else (*rows, width))
    return projected(x, width, residual), x.new_empty((*rows, w1.shape[0])), affine


def _bwd(
    dout: Tensor,
    x: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    affine: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    db1, db2 = w1.new_empty(w1.shape[0]), w2.new_empty(w2.shape[0])
    dx, dw1, dw2 = through(hidden, w1), like(w1, w1), like(w2, w2)
    return of_wanted(wanted, dx, dw1, db1, dw2, db2, like(gamma, w1))


_INPUTS = (
    "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, Tensor? gamma, "
    "Tensor? keep, str? activation=None"
)
_FORWARD, _BACKWARD = "gelu_mlp.triton", "gelu_mlp.triton_bwd"

define(
    "gelu_mlp",
    f"({_INPUTS}) -> Tensor",
    _mlp,
    cpu=CSRC,
    cuda=CSRC,
    cublaslt=CSRC,
    triton=_FORWARD,
)
define(
    "gelu_mlp_fwd",
    f"({_INPUTS}) -> (Tensor out, Tensor hidden, Tensor affine)",
    _fwd,
    cpu=CSRC,
    triton=_FORWARD,
)
define(
    "gelu_mlp_bwd",
    "(Tensor dout, Tensor? x, Tensor w1, Tensor w2, Tensor hidden, Tensor? affine, "
    "Tensor? gamma, Tensor? keep, bool[]? wanted=None, str? activation=None) -> "
    "(Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dgamma)",
    _bwd,
    cpu=CSRC,
    triton=_BACKWARD,
)
