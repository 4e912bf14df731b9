"""Gradients of cross-entropy and of the distillation losses.

The forward pass has saved each row's softmax statistics, so every block of every row is
independent: one read of the inputs, one write of the gradients. With p = softmax(x), t' the
smoothed target, ps and pt the tempered softmaxes of student and teacher (pt one-hot for "hard"):

    dx = (1 - alpha) (p sum(t') - t') / B        ds = weight / tau (ps - pt) / B

with weight = alpha for "hard", alpha tau**2 for "soft" (alpha tau**2 / C for "numel"). Where one
head serves as both, dx is their sum. All fp32 between load and store.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching
from deit.kernels.losses import tiles as losses_tiles
from deit.kernels.losses import triton as losses


@launching.kept
def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, label_smoothing: float
) -> Tensor:
    """dlogits, in logits' dtype."""
    return common.written(plan(dloss, logits, target, statistics, label_smoothing), logits)[0]


@launching.kept
def distillation_loss_bwd(
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
) -> tuple[Tensor, Tensor]:
    """(dlogits, ddistillation_logits), in their dtypes.

    Those not `wanted` are empty, and so is the latter without that head.
    """
    teaching = losses.Teaching(
        teacher_logits, distillation_logits, kind, alpha, temperature, kl_reduction
    )
    of_logits, of_student = wanted or (True, True)
    planned = plan(
        dloss, logits, target, statistics, label_smoothing, teaching,
        of_logits=of_logits, of_student=of_student,
    )  # fmt: skip
    return common.written(planned, logits)


def plan(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    label_smoothing: float,
    teaching: losses.Teaching | None = None,
    *,
    of_logits: bool = True,
    of_student: bool = True,
    config: losses_tiles.LossConfig | None = None,
) -> tuple[tuple[Tensor, Tensor], common.Launch | None]:
    """(dlogits, dstudent), unwritten, and their launch; None where it would write nothing."""
    batch, classes = logits.shape
    student = None if teaching is None else teaching.student
    of_student = of_student and student is not None
    dlogits = logits.new_empty((batch, classes) if of_logits else 0)
    dstudent = logits.new_empty(0)
    if student is not None and of_student:
        dstudent = student.new_empty((batch, classes))
    if batch == 0 or not (of_logits or of_student):
        return (dlogits, dstudent), None
    config = config or losses_tiles.loss(classes)
    blocks = triton.cdiv(classes, config.block)
    arguments = losses.row_arguments(logits, target, label_smoothing, teaching) | {
        "dloss": dloss,
        "statistics": statistics.contiguous(),
        "dlogits": dlogits if of_logits else None,
        "dstudent": dstudent if of_student else None,
        "batch": batch,
        "blocks": blocks,
        "BLOCK": config.block,
    }
    launch = common.Launch(_backward_kernel, (batch * blocks,), arguments, config.num_warps)
    return (dlogits, dstudent), launch


@triton.jit
def _backward_kernel(
    dloss,
    logits,
    target,
    teacher,
    student,
    statistics,
    dlogits,
    dstudent,
    batch,
    blocks,
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
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = cols < classes
    scale = tl.load(dloss).to(tl.float32) / batch
    saved = statistics + row
    x = tl.load(logits + row * logits_stride + cols, mask=mask, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(saved) - tl.load(saved + batch))
    t = losses.true_target(
        target, row, cols, mask, target_stride, classes, smoothing, SOFT_TARGET, SMOOTH
    )
    if not SOFT_TARGET:
        index = tl.load(target + row * target_stride)
        t += tl.where(cols == index, 1.0 - smoothing, 0.0)
    dx = truth * (p * tl.load(saved + 2 * batch) - t)
    if KIND is not None:
        s = x
        if student is not None:
            s = tl.load(student + row * student_stride + cols, mask=mask, other=0.0).to(tl.float32)
        ps = tl.exp((s - tl.load(saved + 3 * batch)) * inverse_temperature
                    - tl.load(saved + 4 * batch))  # fmt: skip
        if KIND == "hard":
            pt = tl.where(cols == tl.load(saved + 5 * batch).to(tl.int32), 1.0, 0.0)
        else:
            y = tl.load(teacher + row * teacher_stride + cols, mask=mask, other=0.0).to(tl.float32)
            pt = tl.exp((y - tl.load(saved + 5 * batch)) * inverse_temperature
                        - tl.load(saved + 6 * batch))  # fmt: skip
        ds = imitation * inverse_temperature * (ps - pt)
        if student is None:
            dx += ds
        if dstudent is not None:
            at = dstudent + row * classes + cols
            tl.store(at, (scale * ds).to(dstudent.dtype.element_ty), mask=mask)
    if dlogits is not None:
        at = dlogits + row * classes + cols
        tl.store(at, (scale * dx).to(dlogits.dtype.element_ty), mask=mask)
