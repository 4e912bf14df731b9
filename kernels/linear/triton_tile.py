"""One tile of a linear layer's output: its sum, and what is done to it before it is written."""

from __future__ import annotations

import triton
import triton.language as tl

from deit.kernels.device import common
from deit.kernels.linear import triton_row_stats as statistics


@triton.jit
def product(
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
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x @ weight.T over channels `first` to `last`, in fp32, for the tile at row m0, column n0.

    `last` is the depth, or a whole number of blocks behind `first`.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k0 in tl.range(first, last, BLOCK_K):
            a = x.load([m0, k0])
            b = weight.load([n0, k0])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        row = m0 + tl.arange(0, BLOCK_M)
        col = n0 + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        a_at = x + common.row_offsets(row, inner, x_outer, x_inner)[:, None] + ks[None, :]
        b_at = weight + col.to(tl.int64)[:, None] * weight_stride + ks[None, :]
        for k0 in tl.range(first, last, BLOCK_K):
            k_mask = (ks < last - k0)[None, :]
            a = tl.load(a_at + k0, mask=(row < rows)[:, None] & k_mask, other=0.0)
            b = tl.load(b_at + k0, mask=(col < width)[:, None] & k_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def residual_at(residual, row, col, inner, residual_outer, residual_inner):
    """Pointers to a tile of the residual."""
    at = common.row_offsets(row, inner, residual_outer, residual_inner)
    return residual + at[:, None] + col[None, :]


@triton.jit
def epilogue(
    acc,
    bias,
    residual,
    loaded,
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
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Finish and write the accumulator tile whose first row and column are m0 and n0.

    loaded: the tile of the residual, where it was loaded before the sum; else None.
    """
    row = m0 + tl.arange(0, acc.shape[0])
    col = n0 + tl.arange(0, acc.shape[1])
    row_mask, col_mask = row < rows, col < width
    if bias is not None:
        acc += tl.load(bias + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if affine is not None:
        common.store_tile(affine, acc, m0, n0, rows, width, TMA)
    acc = common.activate(out, acc, ACTIVATION, TMA)
    added = None
    if residual is not None and loaded is None:
        added = residual_at(residual, row, col, inner, residual_outer, residual_inner)
    acc = common.add_residual(
        acc, added, gamma, keep, row, col, row_mask, col_mask, rows_per_sample
    )
    if loaded is not None:
        acc += loaded.to(tl.float32)
    stored = common.store_tile(out, acc, m0, n0, rows, width, TMA)
    if row_stats_out is not None:
        statistics.store(row_stats_out, stored.to(tl.float32), m0, n0, rows, width)
