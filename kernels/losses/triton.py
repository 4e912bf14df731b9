"""Cross-entropy and the distillation losses: one pass over the logits.

One program a row. Softmax is online (arXiv 1805.02867): a row longer than a block is read block
by block, and what has been summed moves with the running maximum. Everything is measured from that
maximum m: with t' the smoothed target,

    CE = log(sum exp(x - m)) * sum(t') - sum(t' * (x - m))

so logits around 1000 lose nothing; m + log(...), one fp32 number, would be off by 3e-5. All fp32.
A second program adds the rows up in a fixed order. Bytes: each input once, 4 a row for its loss,
and for training another 12 (cross-entropy) or 28.

A class index outside [0, C) is never read at: its row, and so the loss, is NaN, and so are the
row's gradients. (The reference raises on the CPU, and on a GPU aborts the process's kernels.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching
from deit.kernels.losses import tiles as losses_tiles

# Rows of the saved statistics, [CE_STATISTICS or STATISTICS, B] fp32: maximum and log-sum of
# `logits` and sum(t'); maximum and log-sum of the student at the temperature, and of the teacher
# (the teacher's argmax for "hard", exact in fp32 up to 2**24 classes).
CE_STATISTICS, STATISTICS = 3, 7


@launching.kept
def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """`deit.kernels.cross_entropy` on Triton."""
    return common.written(plan(logits, target, label_smoothing), logits)[0]


@launching.kept
def cross_entropy_fwd(
    logits: Tensor, target: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """(loss, statistics [3, B]) for `cross_entropy_bwd`."""
    return common.written(plan(logits, target, label_smoothing, save=True), logits)


@launching.kept
def distillation_loss(logits: Tensor, *rest: Any) -> Tensor:
    """`deit.kernels.distillation_loss` on Triton."""
    return common.written(_plan_distillation(logits, *rest), logits)[0]


@launching.kept
def distillation_loss_fwd(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(loss, statistics [7, B]) for `distillation_loss_bwd`."""
    return common.written(_plan_distillation(logits, *rest, save=True), logits)


@dataclass(frozen=True)
class Teaching:
    """What distillation adds to cross-entropy, in the operator's arguments; by default nothing."""

    teacher: Tensor | None = None
    student: Tensor | None = None
    kind: str | None = None
    alpha: float = 0.0
    temperature: float = 1.0
    kl_reduction: str = "batchmean"

    def arguments(self, classes: int) -> dict[str, Any]:
        """As the kernels take them; `imitation` weighs the imitation's row in the row's loss."""
        hard = self.kind == "hard"
        temperature = 1.0 if hard else self.temperature
        share = classes if self.kl_reduction == "numel" and not hard else 1
        arguments: dict[str, Any] = {
            "truth": 1.0 - self.alpha,
            "imitation": self.alpha * temperature**2 / share,
            "inverse_temperature": 1.0 / temperature,
            "KIND": self.kind,
        }
        for name, logits in (("teacher", self.teacher), ("student", self.student)):
            logits = None if logits is None else common.last_contiguous(logits)
            arguments[name] = logits
            arguments[f"{name}_stride"] = 0 if logits is None else logits.stride(0)
        return arguments


def row_arguments(
    logits: Tensor, target: Tensor, label_smoothing: float, teaching: Teaching | None
) -> dict[str, Any]:
    """What the forward and the backward kernel both take."""
    classes = logits.shape[1]
    logits, target = common.last_contiguous(logits), common.last_contiguous(target)
    return (teaching or Teaching()).arguments(classes) | {
        "logits": logits,
        "target": target,
        "logits_stride": logits.stride(0),
        "target_stride": target.stride(0),
        "classes": classes,
        "smoothing": label_smoothing,
        "SOFT_TARGET": target.is_floating_point(),
        "SMOOTH": label_smoothing > 0,
    }


def _plan_distillation(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    distillation_logits: Tensor | None,
    kind: str,
    alpha: float,
    temperature: float,
    label_smoothing: float,
    kl_reduction: str,
    *,
    save: bool = False,
) -> tuple[tuple[Tensor, Tensor], list[common.Launch]]:
    teaching = Teaching(teacher_logits, distillation_logits, kind, alpha, temperature, kl_reduction)
    return plan(logits, target, label_smoothing, teaching, save=save)


def plan(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    teaching: Teaching | None = None,
    *,
    save: bool = False,
    config: losses_tiles.LossConfig | None = None,
) -> tuple[tuple[Tensor, Tensor], list[common.Launch]]:
    """(loss, statistics), unwritten, and their launches; statistics are empty unless saved."""
    (batch, classes), device = logits.shape, logits.device
    config = config or losses_tiles.loss(classes)
    saved = 0 if not save else CE_STATISTICS if teaching is None else STATISTICS
    loss = torch.empty((), dtype=torch.float32, device=device)
    statistics, row_loss = (
        torch.empty(shape, dtype=torch.float32, device=device) for shape in ((saved, batch), batch)
    )
    launches = []
    if batch > 0:
        arguments = row_arguments(logits, target, label_smoothing, teaching) | {
            "row_loss": row_loss,
            "statistics": statistics if save else None,
            "batch": batch,
            "BLOCK": config.block,
        }
        launches.append(common.Launch(_rows_kernel, (batch,), arguments, config.num_warps))
    # No rows have the mean 0 / 0 = NaN, as in PyTorch.
    arguments = {"row_loss": row_loss, "loss": loss, "batch": batch, "BLOCK": 1024}
    launches.append(common.Launch(_mean_kernel, (1,), arguments, num_warps=4))
    return (loss, statistics), launches


@triton.jit
def true_target(
    target, row, cols, mask, stride, classes, smoothing, SOFT: tl.constexpr, SMOOTH: tl.constexpr
):
    """The smoothed target of these classes, zero outside the mask; without the one-hot part."""
    t = tl.zeros(cols.shape, tl.float32)
    if SOFT:
        t = tl.load(target + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
        t = t * (1.0 - smoothing)
    if SMOOTH:
        t = tl.where(mask, t + smoothing / classes, 0.0)
    return t


@triton.jit
def _pivot(maximum):
    """0 for a maximum of -inf: -inf - 0 gives exp's 0, -inf - -inf would give NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _advance(maximum, x):
    """(new maximum, what it adds to a logit measured from the old one)."""
    new = tl.maximum(maximum, tl.max(x, 0))
    return new, tl.where(maximum == float("-inf"), 0.0, maximum - _pivot(new))


@triton.jit
def _rows_kernel(
    logits,
    target,
    teacher,
    student,
    row_loss,
    statistics,
    batch,
    classes,
    logits_stride,
    target_stride,
    teacher_stride,
    student_stride,
    smoothing,
    truth,
    imitation,
    inverse_temperature,
    SOFT_TARGET: tl.constexpr,
    SMOOTH: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # maximum, sum of exponentials; dot = sum(t' * (x - maximum)), mass = sum(t').
    m, z, dot, mass = float("-inf"), 0.0, 0.0, 0.0
    s_m, s_z, t_m, t_z, gap = float("-inf"), 0.0, float("-inf"), 0.0, 0.0
    best, label = float("-inf"), tl.full((), 0, tl.int32)
    for c0 in tl.range(0, classes, BLOCK):
        cols = c0 + tl.arange(0, BLOCK)
        mask = cols < classes
        x = tl.load(logits + row * logits_stride + cols, mask=mask, other=float("-inf"))
        x = x.to(tl.float32)
        m, shift = _advance(m, x)
        z = z * tl.exp(shift) + tl.sum(tl.exp(x - _pivot(m)), 0)
        if SOFT_TARGET or SMOOTH:
            t = true_target(
                target, row, cols, mask, target_stride, classes, smoothing, SOFT_TARGET, SMOOTH
            )
            dot += mass * shift + tl.sum(tl.where(mask, t * (x - _pivot(m)), 0.0), 0)
            mass += tl.sum(t, 0)
        if KIND is not None:
            s = x
            if student is not None:
                s = tl.load(student + row * student_stride + cols, mask=mask, other=float("-inf"))
                s = s.to(tl.float32)
            s_m, s_shift = _advance(s_m, s)
            s_rel = (s - _pivot(s_m)) * inverse_temperature
            s_z = s_z * tl.exp(s_shift * inverse_temperature) + tl.sum(tl.exp(s_rel), 0)
            y = tl.load(teacher + row * teacher_stride + cols, mask=mask, other=float("-inf"))
            y = y.to(tl.float32)
        if KIND == "hard":
            y = tl.where(y != y, float("inf"), y)  # argmax takes a NaN for the largest
            highest = tl.max(y, 0)
            label = tl.where(highest > best, c0 + tl.argmax(y, 0), label)
            best = tl.maximum(best, highest)
        if KIND == "soft":
            t_m, t_shift = _advance(t_m, y)
            # gap = sum(exp(teacher) * (teacher - student)), each from its own maximum.
            t_rel = (y - _pivot(t_m)) * inverse_temperature
            e = tl.exp(t_rel)
            decay = tl.exp(t_shift * inverse_temperature)
            gap = decay * (gap + t_z * (t_shift - s_shift) * inverse_temperature)
            gap += tl.sum(tl.where(mask, e * (t_rel - s_rel), 0.0), 0)
            t_z = t_z * decay + tl.sum(e, 0)

    if not SOFT_TARGET:
        index = tl.load(target + row * target_stride)
        valid = (index >= 0) & (index < classes)
        at = logits + row * logits_stride + index
        x_true = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        dot += (1.0 - smoothing) * (x_true - _pivot(m))
        mass = tl.where(valid, 1.0, float("nan"))
    loss = truth * (tl.log(z) * mass - dot)
    if KIND == "hard":
        at = (logits + row * logits_stride) if student is None else (student + row * student_stride)
        loss += imitation * (tl.log(s_z) - (tl.load(at + label).to(tl.float32) - _pivot(s_m)))
    if KIND == "soft":
        loss += imitation * (gap / t_z - tl.log(t_z) + tl.log(s_z))
    tl.store(row_loss + row, loss)
    if statistics is not None:
        at = statistics + row
        tl.store(at, _pivot(m))
        tl.store(at + batch, tl.log(z))
        tl.store(at + 2 * batch, mass)
        if KIND is not None:
            tl.store(at + 3 * batch, _pivot(s_m))
            tl.store(at + 4 * batch, tl.log(s_z))
            tl.store(at + 5 * batch, label.to(tl.float32) if KIND == "hard" else _pivot(t_m))
            tl.store(at + 6 * batch, tl.log(t_z))


@triton.jit
def _mean_kernel(row_loss, loss, batch, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float64)  # one number a row: free, and rounded once
    for first in tl.range(0, batch, BLOCK):
        row = first + tl.arange(0, BLOCK)
        acc += tl.load(row_loss + row, mask=row < batch, other=0.0).to(tl.float64)
    tl.store(loss, tl.sum(acc, 0) / batch)
