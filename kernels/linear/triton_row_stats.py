"""LayerNorm without a pass of its own: statistics by the producer, normalisation by the consumer.

The kernel that writes a stream also writes, for each row and each `STATS_COLUMNS` columns of it,
the mean and the sum of squares about that mean (M2). Their count is known from the width. The
kernel that reads the stream merges a row's parts by the formula of Chan, Golub and LeVeque (1979)
and normalises its rows as they are loaded. Every part has one writer and is merged in one order:
no atomics, and the same bits every time.

[..., 2, parts] of fp32 next to a row of D channels: 6 % of a bf16 row's bytes.

The statistics are those of the stream as it is stored. A row's mean is kept as an unevaluated
sum, its first part's mean and an offset: at a mean of 1000 one fp32 number is off by 3e-5 of a
standard deviation of 1.

The product's algebraic form, rstd * (x @ W' - mean * colsum(W')), is not used: both terms grow
with the mean and their difference does not. At a mean of 1000 and a standard deviation of 1 its
error was 8 times PyTorch's in fp32, and 490 times with an fp32 stream and fp16 products (the rule
allows 1.25): x rounded before it is centred has lost what LayerNorm would have kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.layer_norm import tiles as layer_norm_tiles
from deit.kernels.linear.row_stats import STATS_COLUMNS, row_stats_shape

_COLUMNS = tl.constexpr(STATS_COLUMNS)


class Norm(NamedTuple):
    """The LayerNorm of a product's input: row_stats [..., 2, parts] of x, weight and bias [K].

    row_stats is None where no kernel has written them with x: see `completed`.
    """

    row_stats: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float


def empty(x: Tensor) -> Tensor:
    """Where the statistics of a tensor of x's shape go."""
    return torch.empty(row_stats_shape(x.shape), dtype=torch.float32, device=x.device)


def row_stats(x: Tensor, *, config: layer_norm_tiles.LayerNormConfig | None = None) -> Tensor:
    """The statistics of x [..., D], for a stream that no kernel of ours has written."""
    return common.written(plan(x, config=config), x)


def plan(
    x: Tensor, *, config: layer_norm_tiles.LayerNormConfig | None = None
) -> tuple[Tensor, common.Launch | None]:
    """The statistics, unwritten, and the launch that writes them; None for an empty input."""
    out = empty(x)
    if out.numel() == 0:
        return out, None
    dim = x.shape[-1]
    config = config or layer_norm_tiles.layer_norm(common.architecture(x), x.dtype, dim)
    (view,) = common.as_rows(x)
    arguments = common.row_arguments(view) | {
        "out": out,
        "ROWS": config.rows,
        "PARTS": triton.next_power_of_2(out.shape[-1]),
    }
    grid = (triton.cdiv(arguments["rows"], config.rows),)
    return out, common.Launch(_row_stats_kernel, grid, arguments, config.num_warps)


def completed(norm: Norm, x: Tensor) -> tuple[Norm, common.Launch | None]:
    """norm with the statistics of x, and the launch that writes them where they are not there."""
    if norm.row_stats is not None:
        return norm, None
    row_stats, launch = plan(x)
    return norm._replace(row_stats=row_stats), launch


def prologue(norm: Norm | None, depth: int) -> dict[str, Any]:
    """The arguments of a kernel that calls `merge` and `normalise`."""
    if norm is None:
        nothing = dict.fromkeys(("row_stats", "norm_weight", "norm_bias"))
        return nothing | {"eps": 0.0, "PARTS": 1}
    assert norm.row_stats is not None  # `completed`
    return {
        "row_stats": norm.row_stats.contiguous(),
        **common.contiguous(norm_weight=norm.weight, norm_bias=norm.bias),
        "eps": float(norm.eps),
        "PARTS": triton.next_power_of_2(triton.cdiv(depth, STATS_COLUMNS)),
    }


@triton.jit
def store(row_stats, tile, m0, n0, rows, width):
    """Write the parts of a tile [M, a multiple of 64] of a [rows, width] matrix at m0, n0."""
    parts = tl.cdiv(width, _COLUMNS)
    COUNT: tl.constexpr = tile.shape[1] // _COLUMNS
    values = tile.reshape(tile.shape[0], COUNT, _COLUMNS)
    n = n0 + tl.arange(0, COUNT) * _COLUMNS
    mask = (n[:, None] + tl.arange(0, _COLUMNS)[None, :] < width)[None, :, :]
    count = tl.minimum(tl.maximum(width - n, 1), _COLUMNS).to(tl.float32)[None, :]
    mean = tl.sum(tl.where(mask, values, 0.0), 2) / count
    centred = tl.where(mask, values - mean[:, :, None], 0.0)
    error = tl.sum(centred, 2) / count  # of the mean's rounding; see layer_norm.centre
    centred = tl.where(mask, centred - error[:, :, None], 0.0)
    row = m0 + tl.arange(0, tile.shape[0])
    at = row_stats + row.to(tl.int64)[:, None] * (2 * parts) + (n // _COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (n < width)[None, :]
    tl.store(at, mean + error, mask=inside)
    tl.store(at + parts, tl.sum(centred * centred, 2), mask=inside)


@triton.jit
def merge(row_stats, m0, rows, dim, eps, BLOCK_M: tl.constexpr, PARTS: tl.constexpr):
    """(pivot, offset, rstd) of BLOCK_M rows of `dim` channels; their means are pivot + offset."""
    parts = tl.cdiv(dim, _COLUMNS)
    row, part = m0 + tl.arange(0, BLOCK_M), tl.arange(0, PARTS)
    inside = row < rows
    mask = inside[:, None] & (part < parts)[None, :]
    first = row_stats + row.to(tl.int64) * (2 * parts)
    pivot = tl.load(first, mask=inside, other=0.0)
    at = first[:, None] + part[None, :]
    away = tl.load(at, mask=mask, other=0.0) - pivot[:, None]
    squares = tl.load(at + parts, mask=mask, other=0.0)
    count = tl.minimum(tl.maximum(dim - part * _COLUMNS, 0), _COLUMNS).to(tl.float32)[None, :]
    offset = tl.sum(count * away, 1) / dim
    away -= offset[:, None]
    rstd = tl.math.rsqrt(tl.sum(squares + count * away * away, 1) / dim + eps)
    return pivot, offset, rstd


@triton.jit
def normalise(tile, pivot, offset, rstd, norm_weight, norm_bias, k0, dim):
    """LN of the columns from k0 on, in fp32; zero past the last one."""
    k = k0 + tl.arange(0, tile.shape[1])
    weight = tl.load(norm_weight + k, mask=k < dim, other=0.0).to(tl.float32)
    y = ((tile.to(tl.float32) - pivot[:, None]) - offset[:, None]) * rstd[:, None]
    y *= weight[None, :]
    if norm_bias is not None:
        y += tl.load(norm_bias + k, mask=k < dim, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def chunks(
    x,
    m0,
    row_stats,
    norm_weight,
    norm_bias,
    rows,
    eps,
    dtype,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """BLOCK_M rows of 3 * CHUNK channels as three tiles, normalised where row_stats is given."""
    x0 = x.load([m0, 0])
    x1 = x.load([m0, CHUNK])
    x2 = x.load([m0, 2 * CHUNK])
    if row_stats is not None:
        dim = 3 * CHUNK
        pivot, offset, rstd = merge(row_stats, m0, rows, dim, eps, BLOCK_M, PARTS)
        y0 = normalise(x0, pivot, offset, rstd, norm_weight, norm_bias, 0, dim)
        y1 = normalise(x1, pivot, offset, rstd, norm_weight, norm_bias, CHUNK, dim)
        y2 = normalise(x2, pivot, offset, rstd, norm_weight, norm_bias, 2 * CHUNK, dim)
        x0, x1, x2 = y0.to(dtype), y1.to(dtype), y2.to(dtype)
    return x0, x1, x2


@triton.jit
def _row_stats_kernel(
    x,
    out,
    rows,
    dim,
    inner,
    x_outer,
    x_inner,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, PARTS * _COLUMNS)
    at = common.row_offsets(row, inner, x_outer, x_inner)
    mask = (row < rows)[:, None] & (cols < dim)[None, :]
    values = tl.load(x + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    store(out, values, tl.program_id(0) * ROWS, 0, rows, dim)
