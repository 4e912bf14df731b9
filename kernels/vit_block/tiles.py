"""Which configurations a block is launched with: those of the operators that it is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.device import common
from deit.kernels.device.tiles import Choice, Choices
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.layer_norm import tiles as layer_norm_tiles
from deit.kernels.linear import tiles as linear_tiles


def _choose(x: Tensor, row_stats: Tensor | None, *rest: Any) -> Choice:
    qkv_weight, proj_weight, w1, b1, w2, num_heads = (rest[i] for i in (2, 4, 9, 10, 11, 15))
    qkv = x.new_empty((*x.shape[:-1], qkv_weight.shape[0]), dtype=qkv_weight.dtype)
    mlp = gelu_mlp_tiles.choose(qkv[..., : x.shape[-1]], w1, b1, w2)
    if len(mlp) > 1:  # two products
        mlp[1:2] = _norm_linear(x, w1, has_statistics=True)
    return [*_norm_linear(x, qkv_weight, has_statistics=row_stats is not None),
            *attention_tiles.choose(qkv, num_heads), *linear_tiles.choose(qkv, proj_weight),
            *mlp]  # fmt: skip


def _norm_linear(x: Tensor, weight: Tensor, *, has_statistics: bool) -> Choice:
    arguments = (common.architecture(x), weight.dtype, *weight.shape)
    panel, evidence = linear_tiles.norm_panel.explain(*arguments)
    if panel is not None:
        statistics = [] if has_statistics else layer_norm_tiles.choose(x)
        return [*statistics, (panel, evidence)]
    by_itself = ("LayerNorm by itself", evidence)
    linear = linear_tiles.linear.explain(*arguments)
    return [by_itself, *layer_norm_tiles.choose(x), linear]


CHOICES: Choices = {"vit_block": _choose}
