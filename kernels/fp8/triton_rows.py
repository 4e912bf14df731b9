"""Rows to e4m3, with a scale a row and 128 channels, after a LayerNorm where one is asked for.

One read and one write of the rows: 2 + 1 bytes a channel from bf16, where LayerNorm alone moves 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.device.interpreter import interpreted
from deit.kernels.fp8.quantize import E4M3, GROUP
from deit.kernels.layer_norm import tiles as layer_norm_tiles
from deit.kernels.layer_norm import triton as layer_norm

_GROUP = tl.constexpr(GROUP)
_INFINITY = tl.constexpr(0x7F800000)  # its bits; above them are NaN's, below every number's


class Norm(NamedTuple):
    """A LayerNorm: weight and bias [K]."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class Rows(NamedTuple):
    """A matrix in e4m3 [T, C * 128] and its scales, fp32 [C, T]: those of a tile lie together."""

    e4m3: Tensor
    scales: Tensor


def empty(rows: int, depth: int, device: torch.device) -> Rows:
    """Where `rows` rows of `depth` channels go."""
    groups = triton.cdiv(depth, GROUP)
    return Rows(
        torch.empty((rows, groups * GROUP), dtype=E4M3, device=device),
        torch.empty((groups, rows), dtype=torch.float32, device=device),
    )


def plan(
    x: Tensor, norm: Norm | None, *, config: layer_norm_tiles.LayerNormConfig | None = None
) -> tuple[Rows, common.Launch | None]:
    """x [..., K] as `Rows`, unwritten, and the launch that writes them; None for an empty input."""
    dim = x.shape[-1]
    (view,) = common.as_rows(x)
    rows = view.shape[0] * view.shape[1]
    out = empty(rows, dim, x.device)
    if rows == 0:
        return out, None
    config = config or layer_norm_tiles.layer_norm(common.architecture(x), x.dtype, dim)
    weight, bias, eps = norm or (None, None, 0.0)
    arguments = {
        **common.row_arguments(view),
        **common.contiguous(norm_weight=weight, norm_bias=bias),
        "eps": float(eps),
        "out": out.e4m3,
        "scales": out.scales,
        "ROUNDS_FIRST": interpreted(),
        "ROWS": config.rows,
        "BLOCK_D": max(GROUP, triton.next_power_of_2(dim)),
    }
    grid = (triton.cdiv(rows, config.rows),)
    return out, common.Launch(_fp8_rows_kernel, grid, arguments, config.num_warps)


@triton.jit
def _on_grid(y):
    """y, at most 448, rounded to e4m3's values, to nearest even, in fp32.

    Adding 1.5 * 2**20 times y's power of two leaves no bits below y's fourth.
    """
    power = tl.maximum(y.to(tl.int32, bitcast=True) & _INFINITY, 121 << 23)  # 2**-6, the least
    magic = power.to(tl.float32, bitcast=True) * 1572864.0
    return (y + magic) - magic


@triton.jit
def quantise(values, ROUNDS_FIRST: tl.constexpr):
    """[M, C, 128] in fp32 -> e4m3 of that shape and scales [M, C], as quantize.quantize has it.

    ROUNDS_FIRST: in Triton's interpreter, whose own cast takes ties away from zero, loses the carry
    into an exponent and cuts off what lies below the least normal number. It is right for numbers
    that are e4m3's already. A GPU's cast rounds to nearest even, as PyTorch's does.

    It works on the bits. The largest is taken as an integer, which keeps NaN. 448 is 1.75 * 2**8,
    so a number with more than .75 behind its leading one carries into the exponent.
    """
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    exponent = tl.maximum(((tl.minimum(largest, _INFINITY) + 0x1FFFFF) >> 23) - 8, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    finite = largest < _INFINITY
    scaled = tl.where(finite[:, :, None], values * inverse[:, :, None], 0.0)
    if ROUNDS_FIRST:
        scaled = _on_grid(scaled)
    return scaled.to(tl.float8e4nv), tl.where(finite, scale, float("nan"))


@triton.jit
def _fp8_rows_kernel(
    x,
    norm_weight,
    norm_bias,
    eps,
    out,
    scales,
    rows,
    dim,
    inner,
    x_outer,
    x_inner,
    ROUNDS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    row_mask = row < rows
    mask = row_mask[:, None] & (cols < dim)[None, :]
    at = common.row_offsets(row, inner, x_outer, x_inner)
    values = tl.load(x + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if norm_weight is not None:
        values = layer_norm.normalise(
            values, mask, norm_weight, norm_bias, None, None, row, row_mask, cols, dim, eps
        )
    BLOCKS: tl.constexpr = BLOCK_D // _GROUP
    e4m3, scale = quantise(values.reshape(ROWS, BLOCKS, _GROUP), ROUNDS_FIRST)
    groups = tl.cdiv(dim, _GROUP)
    width = groups * _GROUP
    out_at = row.to(tl.int64)[:, None] * width + cols[None, :]
    out_mask = row_mask[:, None] & (cols < width)[None, :]
    tl.store(out + out_at, e4m3.reshape(ROWS, BLOCK_D), mask=out_mask)
    group = tl.arange(0, BLOCKS)
    scale_at = group.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(scales + scale_at, scale, mask=row_mask[:, None] & (group < groups)[None, :])
