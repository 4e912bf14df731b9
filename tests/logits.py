"""Calls of the losses, and logits that are hard on them, for Triton's kernels and the C++ ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import repeat
from typing import Any

import gradients
import torch
from torch import Tensor

from deit.kernels import cross_entropy, distillation_loss
from deit.kernels.prove import oracle

MANY = 5000  # classes; in Triton two blocks of 2,048 and a part of the next
INF = float("inf")

# (kind, whether the student has a head of its own, kl_reduction)
OPTIONS = [
    *itertools.product(["hard"], [False, True], ["batchmean"]),
    *itertools.product(["soft"], [False, True], ["batchmean", "numel"]),
]

# Where in a row of MANY classes (the targets are 0, 7, 14).
NON_FINITE: dict[str, Callable[[Tensor], Any]] = {
    "a few classes masked": lambda x: x[:, 100:110].fill_(-INF),
    "the true class masked": lambda x: x[:, 7].fill_(-INF),
    "two blocks masked": lambda x: x[1, :4096].fill_(-INF),
    "all classes masked": lambda x: x[1].fill_(-INF),
    "an infinite logit": lambda x: x[1, 4097].fill_(INF),
    "an infinite true logit": lambda x: x[1, 7].fill_(INF),
    "a NaN": lambda x: x[2, 3].fill_(float("nan")),
}

STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns strided": lambda x: x[:, ::2],
    "part of a wider row": lambda x: x[:, 3:67],
    "transposed": lambda x: x[:, :10].t(),
    "one row for all": lambda x: x[:1].expand(10, -1),
    "every second row": lambda x: x[::2],
}


def targets(soft: bool, rows: int, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Indices 0, 7, 14, ...; or probabilities."""
    if soft:
        return oracle.make("random", (rows, classes), seed=8).softmax(1).to(dtype)
    return torch.arange(rows) * 7 % classes


def by_twos(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The losses of two rows at a time.

    One loss is one number, and whether it or PyTorch's is an ulp off is chance. Of several, the
    errors' norms compare.
    """

    def call(*arguments: Any, impl: str) -> Tensor:
        pairs = [a.split(2) if isinstance(a, Tensor) else repeat(a) for a in arguments]
        return torch.stack([loss(*pair, impl=impl) for pair in zip(*pairs, strict=False)])

    return call


def ce(logits: Tensor, target: Tensor, label_smoothing: float, impl: str) -> Tensor:
    """`cross_entropy` by the schema's arguments."""
    return cross_entropy(logits, target, label_smoothing=label_smoothing, impl=impl)


def distil(
    logits: Tensor,
    target: Tensor,
    teacher: Tensor,
    student: Tensor | None,
    kind: str,
    alpha: float,
    temperature: float,
    smoothing: float,
    kl: str,
    impl: str,
) -> Tensor:
    """`distillation_loss` by the schema's arguments."""
    return distillation_loss(
        logits,
        target,
        teacher,
        distillation_logits=student,
        kind=kind,
        alpha=alpha,
        temperature=temperature,
        label_smoothing=smoothing,
        kl_reduction=kl,
        impl=impl,
    )


def check_ce(impl: str, logits: Tensor, target: Tensor, smoothing: float = 0.0) -> list[Tensor]:
    """The error rule on the losses of two rows each and on their gradient."""
    dlosses = torch.linspace(0.7, 1.7, len(logits) // 2)
    return gradients.check(by_twos(ce), (logits, target, smoothing), (0,), (dlosses,), impl=impl)


def check_distil(impl: str, *arguments: Any) -> list[Tensor]:
    """The same of `distil`."""
    wanted = (0,) if arguments[3] is None else (0, 3)
    dlosses = torch.linspace(0.7, 1.7, len(arguments[0]) // 2)
    return gradients.check(by_twos(distil), arguments, wanted, (dlosses,), impl=impl)
