"""Which configurations a call of each operator is launched with, in inference, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common, configs
from deit.kernels.fp8 import tiles as fp8_configs
from deit.kernels.fp8.quantize import E4M3, GROUP


def explain(operator: str, arguments: tuple[Any, ...]) -> tuple[str, ...]:
    """ "LinearConfig(...): pinned default, ..." for each kernel of the call, in launch order."""
    return tuple(f"{config}: {evidence}" for config, evidence in _CHOICES[operator](*arguments))


def _layer_norm(x: Tensor, *_: Any) -> list[tuple[Any, str]]:
    return [configs.layer_norm.explain(common.architecture(x), x.dtype, x.shape[-1])]


def _attention(qkv: Tensor, num_heads: int, *_: Any) -> list[tuple[Any, str]]:
    tokens, head_dim = qkv.shape[1], qkv.shape[-1] // (3 * num_heads)
    tma = common.describable(common.last_contiguous(qkv))
    return [configs.attention.explain(common.architecture(qkv), qkv.dtype, head_dim, tokens, tma)]


def _linear(x: Tensor, weight: Tensor, *_: Any) -> list[tuple[Any, str]]:
    return [configs.linear.explain(common.architecture(x), x.dtype, *weight.shape)]


def _gelu_mlp(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *_: Any) -> list[tuple[Any, str]]:
    one, evidence = configs.gelu_mlp.explain(common.architecture(x), x.dtype, x.shape[-1])
    if one is not None:
        return [(one, evidence)]
    return [("two products", evidence), *_linear(x, w1), *_linear(x, w2)]


def _vit_block(x: Tensor, row_stats: Tensor | None, *rest: Any) -> list[tuple[Any, str]]:
    qkv_weight, proj_weight, w1, b1, w2, num_heads = (rest[i] for i in (2, 4, 9, 10, 11, 15))
    qkv = x.new_empty((*x.shape[:-1], qkv_weight.shape[0]), dtype=qkv_weight.dtype)
    mlp = _gelu_mlp(qkv[..., : x.shape[-1]], w1, b1, w2)
    if len(mlp) > 1:  # two products
        mlp[1:2] = _norm_linear(x, w1, has_statistics=True)
    return [*_norm_linear(x, qkv_weight, has_statistics=row_stats is not None),
            *_attention(qkv, num_heads), *_linear(qkv, proj_weight), *mlp]  # fmt: skip


def _norm_linear(x: Tensor, weight: Tensor, *, has_statistics: bool) -> list[tuple[Any, str]]:
    panel, evidence = configs.norm_panel.explain(
        common.architecture(x), weight.dtype, *weight.shape
    )
    if panel is not None:
        return [*([] if has_statistics else _layer_norm(x)), (panel, evidence)]
    linear = configs.linear.explain(common.architecture(x), weight.dtype, *weight.shape)
    return [("LayerNorm by itself", evidence), *_layer_norm(x), linear]


def _fp8_linear(x: Tensor, weight: Tensor, *_: Any) -> list[tuple[Any, str]]:
    return [*_layer_norm(x), _fp8_product(x.dtype, weight)]


def _fp8_gelu_mlp(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *_: Any) -> list[tuple[Any, str]]:
    return [*_layer_norm(x), _fp8_product(E4M3, w1), _fp8_product(x.dtype, w2)]


def _fp8_product(dtype: torch.dtype, weight: Tensor) -> tuple[Any, str]:
    width, depth = weight.shape
    padded = -(-depth // GROUP) * GROUP
    return fp8_configs.fp8_product.explain(common.architecture(weight), dtype, width, padded)


def _patch_embed(images: Tensor, weight: Tensor, *_: Any) -> list[tuple[Any, str]]:
    arch = common.architecture(images)
    return [configs.patch_embed.explain(arch, images.dtype, weight.shape[0])]


def _loss(logits: Tensor, *_: Any) -> list[tuple[Any, str]]:
    return [configs.loss.explain(logits.shape[-1])]


_CHOICES: dict[str, Callable[..., list[tuple[Any, str]]]] = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _layer_norm,
    "attention": _attention,
    "linear": _linear,
    "fp8_linear": _fp8_linear,
    "fp8_gelu_mlp": _fp8_gelu_mlp,
    "gelu_mlp": _gelu_mlp,
    "vit_block": _vit_block,
    "patch_embed": _patch_embed,
    "cross_entropy": _loss,
    "distillation_loss": _loss,
}
