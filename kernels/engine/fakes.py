"""Shapes and dtypes of what the operators return, for tracing: one fake a schema of ops.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# How many columns of a stream one pair of row statistics covers (linear/triton_row_stats.py).
STATS_COLUMNS = 64


def row_stats_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """[..., 2, parts] for a stream [..., D]: means, then sums of squares about them."""
    return (*shape[:-1], 2, -(-shape[-1] // STATS_COLUMNS))


def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_layer_norm_fake(x: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def _attention_fake(qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None) -> Tensor:
    batch, tokens, channels = qkv.shape
    return qkv.new_empty((batch, tokens, channels // 3))


def _projected(x: Tensor, width: int, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else residual.dtype
    return x.new_empty((*x.shape[:-1], width), dtype=dtype)


def _linear_fake(
    x: Tensor, weight: Tensor, bias: object, activation: object, residual: Tensor | None, *_: object
) -> Tensor:
    return _projected(x, weight.shape[0], residual)


def _gelu_mlp_fake(
    x: Tensor, w1: Tensor, b1: object, w2: Tensor, b2: object, residual: Tensor | None, *_: object
) -> Tensor:
    return _projected(x, w2.shape[0], residual)


def _vit_block_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(row_stats_shape(x.shape), dtype=torch.float32)


def _patch_embed_fake(
    images: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor, pos_embed: Tensor
) -> Tensor:
    return images.new_empty((images.shape[0], pos_embed.shape[1], weight.shape[0]))


def _scalar_loss_fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and rstd of every row."""
    rows = x.shape[:-1]
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _like(given: Tensor | None, other: Tensor) -> Tensor:
    """The gradient of `given`, or the empty tensor that stands for none, made from `other`."""
    return other.new_empty(0) if given is None else given.new_empty(given.shape)


def _of(wanted: Sequence[bool] | None, *gradients: Tensor) -> tuple[Tensor, ...]:
    """The gradients that are wanted, and empty tensors in place of the others."""
    if wanted is None:
        return gradients
    return tuple(g if w else g.new_empty(0) for g, w in zip(gradients, wanted, strict=True))


def _layer_norm_fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape), *_statistics(x))


def _layer_norm_bwd_fake(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    return _of(wanted, _like(x, x), _like(weight, x), _like(weight, x))


def _add_layer_norm_fwd_fake(x: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape), residual.new_empty(x.shape), *_statistics(x))


def _add_layer_norm_bwd_fake(
    dout: Tensor,
    dtotal: Tensor,
    x: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    dweight, dbias, dgamma = (_like(t, weight) for t in (weight, weight, gamma))
    return _of(wanted, _like(dout, dout), _like(total, total), dweight, dbias, dgamma)


def _attention_fwd_fake(
    qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = qkv.shape
    lse = qkv.new_empty((batch, num_heads, tokens), dtype=torch.float32)
    return qkv.new_empty((batch, tokens, channels // 3)), lse


def _attention_bwd_fake(dout: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _linear_fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: object,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: object,
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape[:-1], weight.shape[0]
    saved = activation is not None or gamma is not None
    return _projected(x, width, residual), x.new_empty((*rows, width) if saved else 0)


def _linear_bwd_fake(
    dout: Tensor,
    x: Tensor | None,
    weight: Tensor,
    affine: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    dx, dbias = _through(dout, weight), weight.new_empty(weight.shape[0])
    return _of(wanted, dx, _like(weight, weight), dbias, _like(gamma, weight))


def _through(dout: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a layer's input, in its weight's dtype."""
    return weight.new_empty((*dout.shape[:-1], weight.shape[1]))


def _gelu_mlp_fwd_fake(
    x: Tensor,
    w1: Tensor,
    b1: object,
    w2: Tensor,
    b2: object,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: object,
) -> tuple[Tensor, ...]:
    rows, width = x.shape[:-1], w2.shape[0]
    affine = x.new_empty(0 if gamma is None else (*rows, width))
    return _projected(x, width, residual), x.new_empty((*rows, w1.shape[0])), affine


def _gelu_mlp_bwd_fake(
    dout: Tensor,
    x: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    affine: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    db1, db2 = w1.new_empty(w1.shape[0]), w2.new_empty(w2.shape[0])
    dx, dw1, dw2 = _through(hidden, w1), _like(w1, w1), _like(w2, w2)
    return _of(wanted, dx, dw1, db1, dw2, db2, _like(gamma, w1))


def _patch_embed_bwd_fake(
    dout: Tensor,
    images: Tensor | None,
    weight: Tensor,
    prefix_tokens: int,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    _, tokens, dim = dout.shape
    dprefix, dpos = weight.new_empty((1, prefix_tokens, dim)), weight.new_empty((1, tokens, dim))
    return _of(wanted, _like(weight, weight), weight.new_empty(dim), dprefix, dpos)


def _cross_entropy_fwd_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    statistics = logits.new_empty((3, logits.shape[0]), dtype=torch.float32)
    return _scalar_loss_fake(logits), statistics


def _cross_entropy_bwd_fake(dloss: Tensor, logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _distillation_loss_fwd_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    statistics = logits.new_empty((7, logits.shape[0]), dtype=torch.float32)
    return _scalar_loss_fake(logits), statistics


def _distillation_loss_bwd_fake(
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
    return _of(wanted, _like(logits, logits), _like(distillation_logits, logits))


FAKES: dict[str, Callable[..., object]] = {
    "layer_norm": _layer_norm_fake,
    "add_layer_norm": _add_layer_norm_fake,
    "attention": _attention_fake,
    "linear": _linear_fake,
    "gelu_mlp": _gelu_mlp_fake,
    "vit_block": _vit_block_fake,
    "patch_embed": _patch_embed_fake,
    "cross_entropy": _scalar_loss_fake,
    "distillation_loss": _scalar_loss_fake,
    "layer_norm_fwd": _layer_norm_fwd_fake,
    "layer_norm_bwd": _layer_norm_bwd_fake,
    "add_layer_norm_fwd": _add_layer_norm_fwd_fake,
    "add_layer_norm_bwd": _add_layer_norm_bwd_fake,
    "attention_fwd": _attention_fwd_fake,
    "attention_bwd": _attention_bwd_fake,
    "linear_fwd": _linear_fwd_fake,
    "linear_bwd": _linear_bwd_fake,
    "gelu_mlp_fwd": _gelu_mlp_fwd_fake,
    "gelu_mlp_bwd": _gelu_mlp_bwd_fake,
    "patch_embed_bwd": _patch_embed_bwd_fake,
    "cross_entropy_fwd": _cross_entropy_fwd_fake,
    "cross_entropy_bwd": _cross_entropy_bwd_fake,
    "distillation_loss_fwd": _distillation_loss_fwd_fake,
    "distillation_loss_bwd": _distillation_loss_bwd_fake,
}
