"""The losses in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# PyTorch always ignores one index; -100, its default, is as wrong a class here as any other.
_IGNORE_NOTHING = -(2**31)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch of CE(softmax(logits), target); class indices or probabilities."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(
        logits, target, ignore_index=_IGNORE_NOTHING, label_smoothing=label_smoothing
    )


def distillation_loss(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    distillation_logits: Tensor | None,
    kind: str,
    alpha: float,
    temperature: float,
    label_smoothing: float,
    kl_reduction: str,
) -> Tensor:
    """(1 - alpha) * CE(logits, target) + alpha * (imitation of the teacher), arXiv 2012.12877.

    "hard", eq. (3): CE against the teacher's argmax, never smoothed. "soft", eq. (2):
    temperature**2 * KL(teacher || student) of the tempered softmaxes.
    """
    student = logits if distillation_logits is None else distillation_logits
    if student.dtype in (torch.float16, torch.bfloat16):
        student = student.float()
    teacher = teacher_logits.to(student.dtype)
    if kind == "hard":
        imitation = F.cross_entropy(student, teacher.argmax(dim=1))
    else:
        divergence = F.kl_div(
            F.log_softmax(student / temperature, dim=1),
            F.log_softmax(teacher / temperature, dim=1),
            reduction="sum",
            log_target=True,
        )
        count = student.shape[0] if kl_reduction == "batchmean" else student.numel()
        imitation = divergence * temperature**2 / count  # NaN, not an exception, for no rows
    return (1 - alpha) * cross_entropy(logits, target, label_smoothing) + alpha * imitation
