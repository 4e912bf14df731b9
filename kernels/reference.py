"""Every operator in plain PyTorch: the definition of what each kernel must compute.

These run in any float dtype, fp64 included, on any device, and differentiate by autograd. They
are the oracle of the tests (in fp64), the yardstick of the error rule (in the kernel's own
dtype), and what runs where no kernel does. Arguments are those of `ops.SCHEMAS`, in order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.attention_reference import attention
from deit.kernels.fakes import STATS_COLUMNS
from deit.kernels.fp8_reference import fp8_gelu_mlp, fp8_linear  # noqa: F401
from deit.kernels.int8_reference import (  # noqa: F401
    int8_gelu_mlp,
    int8_linear,
    int8_vit_block,
)


def _add_residual(
    y: Tensor, residual: Tensor | None, gamma: Tensor | None, keep: Tensor | None
) -> Tensor:
    """residual + keep * gamma * y, in the residual's dtype; y alone where all are None."""
    dtype = y.dtype if residual is None else residual.dtype
    if gamma is not None:
        y = y * gamma
    if keep is not None:
        y = y * keep.view(-1, *[1] * (y.dim() - 1))
    if residual is not None:
        y = residual + y
    return y.to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis (arXiv 1607.06450); statistics in at least fp32."""
    if weight.dtype != x.dtype:  # fp32 parameters beside half-precision activations
        return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(LN(s), s) with s = residual + keep * gamma * x; LN(s) in x's dtype, s in residual's."""
    total = _add_residual(x, residual, gamma, keep)
    return layer_norm(total, weight, bias, eps).to(x.dtype), total


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """residual + keep * gamma * act(x wT + bias)."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return _add_residual(y, residual, gamma, keep)


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """residual + keep * gamma * (gelu(x w1T + b1) w2T + b2), the exact (erf) GELU."""
    hidden = F.gelu(F.linear(x, w1, b1))
    return _add_residual(F.linear(hidden, w2, b2), residual, gamma, keep)


def row_stats(x: Tensor) -> Tensor:
    """[..., 2, parts] of x [..., D]: mean and sum of squares about it, of every 64 columns."""
    x = x.double() if x.dtype == torch.float64 else x.float()
    parts = x.split(STATS_COLUMNS, dim=-1)
    means = torch.stack([part.mean(-1) for part in parts], -1)
    squares = [(part - part.mean(-1, keepdim=True)).square().sum(-1) for part in parts]
    return torch.stack([means, torch.stack(squares, -1)], -2)


def vit_block(
    x: Tensor,
    row_stats_of_x: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma2: Tensor | None,
    key_bias: Tensor | None,
    num_heads: int,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A pre-norm block (arXiv 2010.11929, eq. 2 and 3) and its output's row statistics.

    LN sees x itself: statistics that came with it are left unread.
    """
    dtype = qkv_weight.dtype
    normed = layer_norm(x, norm1_weight, norm1_bias, eps).to(dtype)
    qkv = F.linear(normed, qkv_weight, qkv_bias)
    mixed = attention(qkv, num_heads, scale, key_bias)
    x = linear(mixed, proj_weight, proj_bias, None, x, gamma1, None)
    normed = layer_norm(x, norm2_weight, norm2_bias, eps).to(dtype)
    y = gelu_mlp(normed, w1, b1, w2, b2, x, gamma2, None)
    return y, row_stats(y)


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor, pos_embed: Tensor
) -> Tensor:
    """concat(prefix, patches wT + bias) + pos_embed (arXiv 2010.11929, eq. 1)."""
    patches = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = torch.cat([prefix.expand(images.shape[0], -1, -1), patches], dim=1)
    return tokens + pos_embed


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
