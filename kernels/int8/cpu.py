"""The products in 8-bit integers on the CPU: csrc/cpu's kernels on weights packed once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.engine.packing import packed
from deit.kernels.int8.quantize import quantize_channels
from deit.kernels.vit_block.arguments import BlockArguments

PANEL = 32  # output channels; csrc/cpu/int8.h's kPanelColumns


class Int8Weight(NamedTuple):
    """A weight [M, K] as csrc/cpu/int8.h reads it.

    packed: int8 [ceil(M / 32), ceil(K / 4), 32, 4]; scales: [M]; sums: int32 over K, of whole
    panels. What pads to whole panels and fours is zero.
    """

    packed: Tensor
    scales: Tensor
    sums: Tensor


def pack(weight: Tensor) -> Int8Weight:
    """Quantise an fp32 weight [M, K] by output channel, and lay it out."""
    integers, scales = quantize_channels(weight)
    features, depth = integers.shape
    integers = F.pad(integers, (0, -depth % 4, 0, -features % PANEL))
    sums = integers.sum(dim=1, dtype=torch.int32)
    panels = integers.view(-1, PANEL, integers.shape[1] // 4, 4).transpose(1, 2)
    return Int8Weight(panels.contiguous(), scales.contiguous(), sums)


def _kept(weight: Tensor, rows: int) -> Int8Weight:
    return packed(weight, "int8", pack, rows * weight.shape[1])


def _kept_thirds(weights: tuple[Tensor, ...], rows: int) -> Int8Weight:
    return packed(weights, "int8", _pack_thirds, rows * weights[0].shape[1])


def _pack_thirds(*weights: Tensor) -> Int8Weight:
    return pack(torch.cat(weights))


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def int8_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """`deit.kernels.int8_linear`, by its schema's arguments."""
    return torch.ops.deit_cpu.int8_linear_packed(x, *_kept(weight, _rows(x)), *rest)


def int8_gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any) -> Tensor:
    """`deit.kernels.int8_gelu_mlp`, by its schema's arguments."""
    first, second = (_kept(weight, _rows(x)) for weight in (w1, w2))
    return torch.ops.deit_cpu.int8_gelu_mlp_packed(x, *first, b1, *second, *rest)


def int8_linear_thirds(
    x: Tensor, first: Tensor, second: Tensor, third: Tensor, bias: Tensor | None, *norm: Any
) -> Tensor:
    """`int8_linear` by a weight in three tensors, with neither GELU, residual nor gamma."""
    weight = _kept_thirds((first, second, third), _rows(x))
    return torch.ops.deit_cpu.int8_linear_packed(x, *weight, bias, *norm, False, None, None)


def int8_vit_block(x: Tensor, *others: Any) -> Tensor:
    """`deit.kernels.int8_vit_block`, by its schema's arguments."""
    block = BlockArguments(x, None, *others)
    return _block(block, _kept(block.qkv_weight, _rows(x)))


def int8_vit_block_thirds(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    *others: Any,
) -> Tensor:
    """`int8_vit_block` with q, k and v apart."""
    qkv = _kept_thirds((q_weight, k_weight, v_weight), _rows(x))
    return _block(BlockArguments(x, None, norm1_weight, norm1_bias, q_weight, *others), qkv)


def _block(block: BlockArguments, qkv: Int8Weight) -> Tensor:
    rows = _rows(block.x)
    proj, w1, w2 = (_kept(w, rows) for w in (block.proj_weight, block.w1, block.w2))
    return torch.ops.deit_cpu.int8_vit_block_packed(
        block.x, block.norm1_weight, block.norm1_bias, *qkv, block.qkv_bias, *proj, block.proj_bias,
        block.gamma1, block.norm2_weight, block.norm2_bias, *w1, block.b1, *w2, block.b2,
        block.gamma2, block.key_bias, block.num_heads, block.scale, block.eps,
    )  # fmt: skip
