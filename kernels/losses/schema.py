"""Schemas and fakes of cross-entropy and of distillation (arXiv 2012.12877, eq. (2) and (3)).

`statistics` is fp32: so many numbers a row, which the same implementation's backward reads again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deit.kernels.engine.fakes import like, of_wanted
from deit.kernels.engine.registry import CSRC, define


def _scalar(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


def _cross_entropy_fwd(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _scalar(logits), logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


def _cross_entropy_bwd(dloss: Tensor, logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _distillation_fwd(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _scalar(logits), logits.new_empty((7, logits.shape[0]), dtype=torch.float32)


def _distillation_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    distillation_logits: Tensor | None,
    statistics: Tensor,
    kind: str,
    alpha: float,
    temperature: float,
    label_smoothing: float,
    kl_reduction: str,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    return of_wanted(wanted, like(logits, logits), like(distillation_logits, logits))


_TARGETS = "Tensor logits, Tensor target, float label_smoothing"
_LOGITS = "Tensor logits, Tensor target, Tensor teacher_logits, Tensor? distillation_logits"
_OPTIONS = "str kind, float alpha, float temperature, float label_smoothing, str kl_reduction"
_FORWARD, _BACKWARD = "losses.triton", "losses.triton_bwd"

define("cross_entropy", f"({_TARGETS}) -> Tensor", _scalar, cpu=CSRC, triton=_FORWARD)
define(
    "cross_entropy_fwd",
    f"({_TARGETS}) -> (Tensor loss, Tensor statistics)",
    _cross_entropy_fwd,
    cpu=CSRC,
    triton=_FORWARD,
)
define(
    "cross_entropy_bwd",
    "(Tensor dloss, Tensor logits, Tensor target, Tensor statistics, float label_smoothing) "
    "-> Tensor dlogits",
    _cross_entropy_bwd,
    cpu=CSRC,
    triton=_BACKWARD,
)
define(
    "distillation_loss",
    f"({_LOGITS}, {_OPTIONS}) -> Tensor",
    _scalar,
    cpu=CSRC,
    triton=_FORWARD,
)
define(
    "distillation_loss_fwd",
    f"({_LOGITS}, {_OPTIONS}) -> (Tensor loss, Tensor statistics)",
    _distillation_fwd,
    cpu=CSRC,
    triton=_FORWARD,
)
define(
    "distillation_loss_bwd",
    f"(Tensor dloss, {_LOGITS}, Tensor statistics, {_OPTIONS}, bool[]? wanted=None) "
    "-> (Tensor dlogits, Tensor ddistillation_logits)",
    _distillation_bwd,
    cpu=CSRC,
    triton=_BACKWARD,
)
