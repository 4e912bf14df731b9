"""Cross-entropy and the paper's distillation losses."""

from __future__ import annotations

import torch
from torch import Tensor

from deit.kernels import dispatch, validate

# Table 9 and section 4 of arXiv 2012.12877: hard labels share the loss equally, eq. (3); soft
# distillation weighs the teacher by lambda = 0.1 at tau = 3.
DEFAULT_ALPHA = {"hard": 0.5, "soft": 0.1}
KL_REDUCTIONS = ("batchmean", "numel")


def cross_entropy(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, impl: str = "auto"
) -> Tensor:
    """Cross-entropy of softmax(logits) against target, averaged over the batch.

    Args:
        logits: [B, C].
        target: [B] class indices (int64), or [B, C] probabilities (mixup, cutmix).
        label_smoothing: epsilon in [0, 1): target becomes (1 - epsilon) target + epsilon / C.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, at least fp32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    arguments = _prepare_ce(logits, target, label_smoothing=label_smoothing)
    return dispatch.run(_CROSS_ENTROPY, arguments, impl)


def distillation_loss(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_logits: Tensor | None = None,
    kind: str = "hard",
    alpha: float | None = None,
    temperature: float = 3.0,
    label_smoothing: float = 0.1,
    kl_reduction: str = "batchmean",
    impl: str = "auto",
) -> Tensor:
    """(1 - alpha) * CE(logits, target) + alpha * imitation of the teacher (arXiv 2012.12877).

    "hard", eq. (3): imitation is the cross-entropy against the teacher's argmax, not smoothed.
    "soft", eq. (2): temperature**2 * KL(softmax(teacher / t) || softmax(student / t)).

    Args:
        logits: [B, C], the class head's.
        target: [B] class indices or [B, C] probabilities, smoothed by `label_smoothing`.
        teacher_logits: [B, C].
        distillation_logits: [B, C], the distillation head's; None to imitate with `logits`.
        kind: "hard" or "soft".
        alpha: the teacher's share; None for the paper's, 0.5 (hard) and 0.1 (soft).
        temperature: tau, for "soft".
        label_smoothing: epsilon in [0, 1), on the true labels only.
        kl_reduction: "batchmean", or "numel", which divides by B * C as the official code does.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, at least fp32.

    Raises:
        As `cross_entropy`.
    """
    arguments = _prepare_distillation(
        logits,
        target,
        teacher_logits,
        distillation_logits=distillation_logits,
        kind=kind,
        alpha=alpha,
        temperature=temperature,
        label_smoothing=label_smoothing,
        kl_reduction=kl_reduction,
    )
    return dispatch.run(_DISTILLATION_LOSS, arguments, impl)


def _prepare_ce(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0
) -> dispatch.Arguments:
    validate.tensor("logits", logits, rank=2)
    batch, classes = logits.shape
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor; got {type(target).__name__}")
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target: expected probabilities of shape {(batch, classes)}; "
                f"got {tuple(target.shape)}"
            )
    elif target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 class indices or floats; got {target.dtype}")
    elif target.shape != (batch,):
        raise ValueError(f"target: expected indices of shape {(batch,)}; got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"target: expected on {logits.device}; got {target.device}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: expected in [0, 1); got {label_smoothing}")
    return logits, target, float(label_smoothing)


def _prepare_distillation(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_logits: Tensor | None = None,
    kind: str = "hard",
    alpha: float | None = None,
    temperature: float = 3.0,
    label_smoothing: float = 0.1,
    kl_reduction: str = "batchmean",
) -> dispatch.Arguments:
    _prepare_ce(logits, target, label_smoothing=label_smoothing)
    for name, other in (
        ("teacher_logits", teacher_logits),
        ("distillation_logits", distillation_logits),
    ):
        if other is not None:
            validate.tensor(name, other, rank=2)
            if other.shape != logits.shape or other.device != logits.device:
                raise ValueError(
                    f"{name}: expected {tuple(logits.shape)} on {logits.device}, as logits; "
                    f"got {tuple(other.shape)} on {other.device}"
                )
    if kind not in DEFAULT_ALPHA:
        raise ValueError(f"kind: expected 'hard' or 'soft'; got {kind!r}")
    alpha = DEFAULT_ALPHA[kind] if alpha is None else alpha
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected in [0, 1]; got {alpha}")
    if not temperature > 0.0:
        raise ValueError(f"temperature: expected > 0; got {temperature}")
    if kl_reduction not in KL_REDUCTIONS:
        raise ValueError(f"kl_reduction: expected one of {KL_REDUCTIONS}; got {kl_reduction!r}")
    return (
        logits,
        target,
        teacher_logits,
        distillation_logits,
        kind,
        float(alpha),
        float(temperature),
        float(label_smoothing),
        kl_reduction,
    )


_CROSS_ENTROPY = dispatch.Operator("cross_entropy", _prepare_ce, dispatch.no_limits)
_DISTILLATION_LOSS = dispatch.Operator(
    "distillation_loss", _prepare_distillation, dispatch.no_limits
)
