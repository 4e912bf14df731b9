"""A linear layer; bias, activation, LayerScale, stochastic depth and residual are its epilogue.

A persistent kernel: one program a multiprocessor walks the output tiles, numbered in groups
that reuse x and weight in L2. Operands come by tensor descriptors (TMA) on Hopper and later,
by pointers elsewhere and for addresses or strides that descriptors cannot take. The epilogue
works on the fp32 accumulator; PyTorch rounds to x's dtype before the activation and the residual.

For a whole block (vit_block/triton.py) the same kernel also writes its output's row statistics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton_row_stats as statistics
from deit.kernels.linear.row_stats import STATS_COLUMNS


@launching.kept
def linear(
    x: Tensor, weight: Tensor, *rest: Any, config: linear_tiles.LinearConfig | None = None
) -> Tensor:
    """`deit.kernels.linear` on Triton, by its schema's arguments (`plan`).

    x, weight and residual are made contiguous in their last axis where they are not; other
    strides are used as they are (see `common.as_rows`).
    """
    return common.written(plan(x, weight, *rest, config=config), x)


@launching.kept
def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    *,
    config: linear_tiles.LinearConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear`, and x @ weight.T + bias in x's dtype where the backward needs it, else empty.

    The same kernel writes both: the epilogue stores its accumulator before the activation.
    """
    needed = activation is not None or gamma is not None
    affine = x.new_empty((*x.shape[:-1], weight.shape[0]) if needed else (0,))
    options: dict[str, Any] = {"affine": affine if needed else None, "config": config}
    planned = plan(x, weight, bias, activation, residual, gamma, keep, **options)
    return common.written(planned, x), affine


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    *,
    affine: Tensor | None = None,
    row_stats: Tensor | None = None,
    config: linear_tiles.LinearConfig | None = None,
) -> tuple[Tensor, common.Launch | None]:
    """The output, unwritten, and the launch that writes it; None for an empty output.

    affine: contiguous, of the output's shape and x's dtype, to be written too; or None.
    row_stats: `statistics.empty` of the output, to be written too; or None.
    """
    width, depth = weight.shape
    dtype = weight.dtype if residual is None else residual.dtype
    out = torch.empty((*x.shape[:-1], width), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out, None
    if config is None:
        config = linear_tiles.linear(common.architecture(x), weight.dtype, width, depth)
    x_view, residual_view = common.as_rows(x, residual)
    weight = common.last_contiguous(weight)
    outer, inner, _ = x_view.shape
    out_rows = out.view(outer * inner, width)
    affine_rows = None if affine is None else affine.view(outer * inner, width)
    if not _tma_can_take(x_view, weight, out_rows, affine_rows):
        config = config.without_tma()
    if out.element_size() == 4:  # twice the staging: flattened, 256 to 272 KB of shared memory
        config = replace(config, flatten=False)
    # With affine, 128 columns of an fp32 output would ask for 96 KB of staging, and pointers to
    # 64 spill 8 bytes on sm_100 and sm_120.
    columns = 128
    if affine is not None:
        columns = 32 if not config.tma else 64 if out.element_size() == 4 else 128
    if row_stats is not None:
        columns = STATS_COLUMNS
        # Four stages spill 8 bytes in fp16 on sm_100 under triton 3.8.
        config = replace(config, num_stages=min(config.num_stages, 3))
    epilogues = config.epilogues(columns)
    x_outer, x_inner = common.row_strides(x_view)
    arguments = {
        **_operands(x_view, weight, out_rows, affine_rows, config, config.block_n // epilogues),
        **common.contiguous(bias=bias),
        **common.epilogue_arguments(x, residual_view, gamma, keep),
        "row_stats_out": row_stats,
        "rows": outer * inner,
        "width": width,
        "depth": depth,
        "inner": inner,
        "x_outer": x_outer,
        "x_inner": x_inner,
        "weight_stride": weight.stride(0),
        "ACTIVATION": activation,
        "TMA": config.tma,
        "PRECISION": common.precision(weight.dtype),
        "GROUP": config.group,
        "EPILOGUES": epilogues,
        "FLATTEN": config.flatten,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    tiles = triton.cdiv(outer * inner, config.block_m) * triton.cdiv(width, config.block_n)
    grid = (min(tiles, config.programs * common.multiprocessors(x)),)
    return out, common.Launch(_linear_kernel, grid, arguments, config.num_warps, config.num_stages)


def _tma_can_take(x_view: Tensor, weight: Tensor, out: Tensor, affine: Tensor | None) -> bool:
    """x must be one evenly spaced list of rows, and all of them describable."""
    return common.evenly_spaced(x_view) and all(
        common.describable(t)
        for t in (x_view.view(-1, x_view.shape[-1]), weight, out, affine)
        if t is not None
    )


def _operands(
    x_view: Tensor,
    weight: Tensor,
    out: Tensor,
    affine: Tensor | None,
    config: linear_tiles.LinearConfig,
    columns: int,
) -> dict[str, object]:
    if not config.tma:
        return {"x": x_view, "weight": weight, "out": out, "affine": affine}
    written = (config.block_m, columns)
    rows = x_view.view(-1, x_view.shape[-1])
    return {
        "x": common.descriptor(rows, config.block_m, config.block_k),
        "weight": common.descriptor(weight, config.block_n, config.block_k),
        "out": common.descriptor(out, *written),
        "affine": None if affine is None else common.descriptor(affine, *written),
    }


@triton.jit
def epilogue(
    acc,
    bias,
    residual,
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
    """Finish and write the accumulator tile whose first row and column are m0 and n0."""
    row = m0 + tl.arange(0, acc.shape[0])
    col = n0 + tl.arange(0, acc.shape[1])
    row_mask, col_mask = row < rows, col < width
    if bias is not None:
        acc += tl.load(bias + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if affine is not None:
        common.store_tile(affine, acc, m0, n0, rows, width, TMA)
    acc = common.activate(out, acc, ACTIVATION, TMA)
    added = None
    if residual is not None:
        at = common.row_offsets(row, inner, residual_outer, residual_inner)
        added = residual + at[:, None] + col[None, :]
    acc = common.add_residual(
        acc, added, gamma, keep, row, col, row_mask, col_mask, rows_per_sample
    )
    stored = common.store_tile(out, acc, m0, n0, rows, width, TMA)
    if row_stats_out is not None:
        statistics.store(row_stats_out, stored.to(tl.float32), m0, n0, rows, width)


@triton.jit
def _linear_kernel(
    x,
    weight,
    bias,
    residual,
    gamma,
    keep,
    out,
    affine,
    row_stats_out,
    rows,
    width,
    depth,
    inner,
    x_outer,
    x_inner,
    weight_stride,
    residual_outer,
    residual_inner,
    rows_per_sample,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    EPILOGUES: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m0, n0 = common.tile_origin(tile, rows, width, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            for k0 in tl.range(0, depth, BLOCK_K):
                a = x.load([m0, k0])
                b = weight.load([n0, k0])
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        else:
            row = m0 + tl.arange(0, BLOCK_M)
            col = n0 + tl.arange(0, BLOCK_N)
            ks = tl.arange(0, BLOCK_K)
            a_at = x + common.row_offsets(row, inner, x_outer, x_inner)[:, None] + ks[None, :]
            b_at = weight + col.to(tl.int64)[:, None] * weight_stride + ks[None, :]
            for k0 in tl.range(0, depth, BLOCK_K):
                k_mask = (ks < depth - k0)[None, :]
                a = tl.load(a_at + k0, mask=(row < rows)[:, None] & k_mask, other=0.0)
                b = tl.load(b_at + k0, mask=(col < width)[:, None] & k_mask, other=0.0)
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

        parts = common.column_parts(acc, EPILOGUES)
        for part in tl.static_range(EPILOGUES):
            epilogue(
                parts[part],
                bias,
                residual,
                gamma,
                keep,
                out,
                affine,
                row_stats_out,
                m0,
                n0 + part * (BLOCK_N // EPILOGUES),
                rows,
                width,
                inner,
                residual_outer,
                residual_inner,
                rows_per_sample,
                ACTIVATION,
                TMA,
            )
