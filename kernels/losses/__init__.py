"""Cross-entropy and the paper's distillation losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import dispatch, limits, validate
from deit.kernels.engine.derivatives import gradients, once_differentiable
from deit.kernels.engine.operator import Operator, register
from deit.kernels.engine.registry import COMPILED
from deit.kernels.losses import reference
from deit.kernels.losses import schema as schema

# Table 9 and section 4 of arXiv 2012.12877: hard labels share the loss equally, eq. (3); soft
# distillation weighs the teacher by lambda = 0.1 at tau = 3.
DEFAULT_ALPHA = {"hard": 0.5, "soft": 0.1}
KL_REDUCTIONS = ("batchmean", "numel")


def cross_entropy(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, impl: str = "auto"
) -> Tensor:
    """Cross-entropy of softmax(logits) against target, averaged over the batch.

    Args:
        logits: [B, C], C >= 1.
        target: [B] class indices (int64), or [B, C] probabilities (mixup, cutmix). No index means
            "ignore". One outside [0, C) is an error on a CPU: an IndexError by PyTorch's, a
            RuntimeError that names it by C++. On a GPU PyTorch's fails a device assertion, and
            Triton makes the loss and its row's gradient NaN.
        label_smoothing: epsilon in [0, 1): target becomes (1 - epsilon) target + epsilon / C.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, at least fp32; NaN for an empty batch.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    label_smoothing = _check_targets(logits, target, label_smoothing)
    return dispatch.run(_CROSS_ENTROPY, (logits, target, label_smoothing), impl)


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
        A scalar, at least fp32; NaN for an empty batch.

    Raises:
        As `cross_entropy`.
    """
    label_smoothing = _check_targets(logits, target, label_smoothing)
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
    if not isinstance(kind, str) or kind not in DEFAULT_ALPHA:
        raise ValueError(f"kind: expected 'hard' or 'soft'; got {kind!r}")
    alpha = DEFAULT_ALPHA[kind] if alpha is None else validate.number("alpha", alpha)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected in [0, 1]; got {alpha}")
    temperature = validate.number("temperature", temperature)
    if temperature <= 0.0:
        raise ValueError(f"temperature: expected > 0; got {temperature}")
    if kl_reduction not in KL_REDUCTIONS:
        raise ValueError(f"kl_reduction: expected one of {KL_REDUCTIONS}; got {kl_reduction!r}")
    arguments = (
        logits, target, teacher_logits, distillation_logits,
        kind, alpha, temperature, label_smoothing, kl_reduction,
    )  # fmt: skip
    return dispatch.run(_DISTILLATION_LOSS, arguments, impl)


def _check_targets(logits: Tensor, target: Tensor, label_smoothing: float) -> float:
    """label_smoothing as a float; logits and targets are what a cross-entropy takes."""
    validate.tensor("logits", logits, rank=2)
    batch, classes = logits.shape
    if classes == 0:
        raise ValueError(f"logits: expected at least one class; got shape {(batch, classes)}")
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
    label_smoothing = validate.number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: expected in [0, 1); got {label_smoothing}")
    return label_smoothing


class _CrossEntropy(torch.autograd.Function):
    """Differentiates by an implementation's `cross_entropy_fwd` and `cross_entropy_bwd`."""

    @staticmethod
    def forward(
        ctx: Any, implementation: str, logits: Tensor, target: Tensor, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        kernel = COMPILED[implementation]["cross_entropy_fwd"]
        loss, statistics = kernel(logits, target, label_smoothing)
        ctx.implementation, ctx.label_smoothing = implementation, label_smoothing
        ctx.save_for_backward(logits, target, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for the statistics
        return loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        backward = COMPILED[ctx.implementation]["cross_entropy_bwd"]
        return None, backward(dloss, *ctx.saved_tensors, ctx.label_smoothing), None, None


class _DistillationLoss(torch.autograd.Function):
    """Differentiates by `distillation_loss_fwd` and `distillation_loss_bwd`."""

    @staticmethod
    def forward(ctx: Any, implementation: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, statistics = COMPILED[implementation]["distillation_loss_fwd"](*arguments)
        logits, target, teacher_logits, token_logits, *ctx.options = arguments
        ctx.implementation = implementation
        ctx.save_for_backward(logits, target, teacher_logits, token_logits, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for the statistics
        return loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        kernel = COMPILED[ctx.implementation]["distillation_loss_bwd"]
        saved = (*ctx.saved_tensors, *ctx.options)
        return tuple(gradients(ctx, lambda wanted: kernel(dloss, *saved, wanted), (1, 4)))


def _train_ce(implementation: str, *arguments: Any) -> Tensor:
    return _CrossEntropy.apply(implementation, *arguments)[0]


def _train_distillation(implementation: str, *arguments: Any) -> Tensor:
    return _DistillationLoss.apply(implementation, *arguments)[0]


def _limits(implementation: str, logits: Tensor, *others: Any) -> list[str]:
    return limits.unserved(*others)  # probabilities and other logits have dtypes of their own


def _sizes(logits: Tensor, *_: object) -> tuple[int, ...]:
    return (int(logits.shape[-1]),)


_CROSS_ENTROPY = register(
    Operator(
        cross_entropy,
        reference.cross_entropy,
        _limits,
        _train_ce,
        constants={1: "target"},
        sizes=_sizes,
    )
)
_DISTILLATION_LOSS = register(
    Operator(
        distillation_loss,
        reference.distillation_loss,
        _limits,
        _train_distillation,
        constants={1: "target", 2: "teacher_logits"},
        sizes=_sizes,
    )
)
