"""Calls of the losses; a batch of logits is as many as `Size.batch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.prove.calls import Call, Draw, Size, Stated

# Arithmetic an element of the logits; exp counts as one. Cross-entropy: maximum, subtraction, exp,
# sum, smoothing's sum; backward: subtraction, exp, scale, target. Distillation: two of them, and
# the teacher's maximum.
_CROSS_ENTROPY, _DISTILLATION = (5, 4), (11, 8)


def _logits(draw: Draw, size: Size, seed: int) -> Tensor:
    if draw.family == "one_hot":
        return draw.random(size.batch, size.classes, seed=seed, scale=25.0)
    return draw.activation(size.batch, size.classes, seed=seed)


def _cross_entropy(draw: Draw, size: Size, form: str) -> Call:
    generator = torch.Generator().manual_seed(5 + 100 * draw.number)
    target = torch.randint(size.classes, (size.batch,), generator=generator)
    inputs = {"logits": _logits(draw, size, 1), "target": target.to(draw.device)}
    options = {} if form == "least" else {"label_smoothing": 0.1}
    return Call("cross_entropy", inputs, options, ("logits",), _flops(inputs, _CROSS_ENTROPY))


def _distillation_loss(draw: Draw, size: Size, form: str) -> Call:
    inputs = _cross_entropy(draw, size, form).inputs
    inputs["teacher_logits"] = _logits(draw, size, 2)
    options: dict[str, Any] = {}
    if form != "least":
        inputs["distillation_logits"] = _logits(draw, size, 3)
        options["kind"] = "hard" if form == "inference" else "soft"
    if form == "every":
        options |= {"alpha": 0.3, "temperature": 2.0, "label_smoothing": 0.2}
    gradients = tuple(n for n in ("logits", "distillation_logits") if n in inputs)
    return Call("distillation_loss", inputs, options, gradients, _flops(inputs, _DISTILLATION))


def _flops(inputs: dict[str, Tensor], each: tuple[int, int]) -> tuple[float, float]:
    forward, backward = (float(one * inputs["logits"].numel()) for one in each)
    return forward, backward


CALLS = {
    "cross_entropy": Stated(_cross_entropy, softmax=True, loss=True),
    "distillation_loss": Stated(_distillation_loss, softmax=True, loss=True),
}
