"""The products in 8-bit integers on the CPU: csrc/cpu's kernels on weights packed once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.engine.packing import packed
from deit.kernels.int8.quantize import quantize_channels

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


def int8_vit_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    *rest: Any,
) -> Tensor:
    """`deit.kernels.int8_vit_block`, by its schema's arguments."""
    qkv = _kept(qkv_weight, _rows(x))
    return _block(x, norm1_weight, norm1_bias, qkv, *rest)


def int8_vit_block_thirds(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    *rest: Any,
) -> Tensor:
    """`int8_vit_block` with q, k and v apart."""
    qkv = _kept_thirds((q_weight, k_weight, v_weight), _rows(x))
    return _block(x, norm1_weight, norm1_bias, qkv, *rest)


def _block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv: Int8Weight,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    *rest: Any,
) -> Tensor:
    rows = _rows(x)
    return torch.ops.deit_cpu.int8_vit_block_packed(
        x, norm1_weight, norm1_bias, *qkv, qkv_bias, *_kept(proj_weight, rows), proj_bias,
        gamma1, norm2_weight, norm2_bias,
        *_kept(w1, rows), b1, *_kept(w2, rows), *rest,
    )  # fmt: skip
