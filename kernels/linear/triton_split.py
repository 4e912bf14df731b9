"""A linear layer of few rows, its sums cut into parts: one launch for the parts, one to add them.

At one image DeiT's fc2 has 24 tiles of 128 x 64 for an H100's 132 multiprocessors. So each tile is
multiplied by several programs, each over a part of the input channels. They write fp32, and the
second launch adds a tile's parts in their order, the first first, before its epilogue. No float is
added atomically, so a repeated call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from deit.kernels.device import common
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear.triton_tile import epilogue, product

# A program of the second launch. As wide as the statistics' parts (row_stats.STATS_COLUMNS), and
# small: one image of DeiT-B makes 156 of them.
_ROWS, _COLUMNS = 16, 64


def parts_of(config: linear_tiles.LinearConfig, depth: int) -> tuple[int, int]:
    """Into how many parts a sum of `depth` is cut, and how long each is; none is empty."""
    steps = max(triton.cdiv(depth, config.block_k), 1)
    each = triton.cdiv(steps, min(config.splits, steps))
    return triton.cdiv(steps, each), each * config.block_k


def plan(
    summed: Mapping[str, Any], finished: Mapping[str, Any], config: linear_tiles.LinearConfig
) -> tuple[common.Launch, common.Launch]:
    """The two launches that write `finished["out"]` [rows, width]; the parts are allocated here.

    summed, finished: the arguments of `_parts_kernel` and `_sum_kernel`, but for what is of the
        parts.
    """
    out = finished["out"]
    rows, width = out.shape
    splits, split_depth = parts_of(config, summed["depth"])
    parts = torch.empty((splits, rows, width), dtype=torch.float32, device=out.device)
    first = {**summed, "parts": parts, "split_depth": split_depth}
    block = {"SPLITS": splits, "BLOCK_M": _ROWS, "BLOCK_N": _COLUMNS}
    second = {**finished, "parts": parts, **block}
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))
    return (
        common.Launch(_parts_kernel, (tiles * splits,), first, config.num_warps, config.num_stages),
        common.Launch(_sum_kernel, grid, second, num_warps=4),
    )


@triton.jit
def _parts_kernel(
    x,
    weight,
    parts,
    rows,
    width,
    depth,
    split_depth,
    inner,
    x_outer,
    x_inner,
    weight_stride,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts [splits, rows, width]: x @ weight.T over split_depth channels each.

    The tiles of one part run together, so they share its channels of x and weight in L2.
    """
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    split = tl.program_id(0) // tiles
    m0, n0 = common.tile_origin(tl.program_id(0) % tiles, rows, width, BLOCK_M, BLOCK_N, GROUP)
    first = split * split_depth
    last = tl.minimum(first + split_depth, depth)
    # A way around the loop would set the sums, and ptxas then await every wgmma (triton 3.6).
    tl.assume(first < last)
    acc = product(
        x,
        weight,
        m0,
        n0,
        first,
        last,
        rows,
        width,
        inner,
        x_outer,
        x_inner,
        weight_stride,
        TMA,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    at = parts + split.to(tl.int64) * rows * width
    common.store_tile(at, acc, m0, n0, rows, width, False)


@triton.jit
def _sum_kernel(
    parts,
    bias,
    residual,
    gamma,
    keep,
    out,
    affine,
    row_stats_out,
    rows,
    width,
    inner,
    residual_outer,
    residual_inner,
    rows_per_sample,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of each tile's sum, its parts added from the first to the last."""
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    row, col = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    at = parts + (row.to(tl.int64)[:, None] * width + col[None, :])
    part = tl.cast(rows, tl.int64) * width
    acc = tl.load(at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(at + split * part, mask=mask, other=0.0)
    epilogue(
        acc,
        bias,
        residual,
        None,
        gamma,
        keep,
        out,
        affine,
        row_stats_out,
        m0,
        n0,
        rows,
        width,
        inner,
        residual_outer,
        residual_inner,
        rows_per_sample,
        ACTIVATION,
        False,
    )
