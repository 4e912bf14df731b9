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
from deit.kernels.vit_block.arguments import BlockArguments


def _choose(*arguments: Any) -> Choice:
    block = BlockArguments(*arguments)
    x, weight = block.x, block.qkv_weight
    qkv = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype)
    mlp = gelu_mlp_tiles.choose(qkv[..., : x.shape[-1]], block.w1, block.b1, block.w2)
    if len(mlp) > 1:  # two products
        mlp[1:2] = _norm_linear(x, block.w1, has_statistics=True)
    mixed = attention_tiles.choose(qkv, block.num_heads)
    norm1 = _norm_linear(x, weight, has_statistics=block.row_stats is not None)
    return [*norm1, *mixed, *linear_tiles.choose(qkv, block.proj_weight), *mlp]


def _norm_linear(x: Tensor, weight: Tensor, *, has_statistics: bool) -> Choice:
    arguments = (common.architecture(x), weight.dtype, *weight.shape)
    panel, evidence = linear_tiles.norm_panel.explain(*arguments)
    if panel is not None:
        statistics = [] if has_statistics else layer_norm_tiles.choose(x)
        return [*statistics, (panel, evidence)]
    by_itself = ("LayerNorm by itself", evidence)
    return [by_itself, *layer_norm_tiles.choose(x), *linear_tiles.choose(x, weight)]


CHOICES: Choices = {"vit_block": _choose}
