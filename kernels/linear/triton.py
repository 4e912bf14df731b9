"""A linear layer; bias, activation, LayerScale, stochastic depth and residual are its epilogue.

A persistent kernel: one program a multiprocessor walks the output tiles, numbered in groups
that reuse x and weight in L2. Operands come by tensor descriptors (TMA) on Hopper and later,
by pointers elsewhere and for addresses or strides that descriptors cannot take. The epilogue
works on the fp32 accumulator; PyTorch rounds to x's dtype before the activation and the residual.
Where rows are few, sums may be cut into parts (triton_split.py).

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
from deit.kernels.linear import triton_split as split
from deit.kernels.linear.row_stats import STATS_COLUMNS
from deit.kernels.linear.triton_tile import epilogue, product, residual_at


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
) -> tuple[Tensor, tuple[common.Launch, ...]]:
    """The output, unwritten, and the launches that write it, in order; none for an empty output.

    affine: contiguous, of the output's shape and x's dtype, to be written too; or None.
    row_stats: `triton_row_stats.empty` of the output, to be written too; or None.
    """
    width, depth = weight.shape
    dtype = weight.dtype if residual is None else residual.dtype
    out = torch.empty((*x.shape[:-1], width), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out, ()
    config = config or linear_tiles.linear(*linear_tiles.asked(x, weight))
    x_view, residual_view = common.as_rows(x, residual)
    weight = common.last_contiguous(weight)
    outer, inner, _ = x_view.shape
    out_rows = out.view(outer * inner, width)
    affine_rows = None if affine is None else affine.view(outer * inner, width)
    if not _tma_can_take(x_view, weight, out_rows, affine_rows):
        config = config.without_tma()
    x_outer, x_inner = common.row_strides(x_view)
    both = {"rows": outer * inner, "width": width, "inner": inner}
    summed = {
        **_factors(x_view, weight, config),
        "depth": depth,
        "x_outer": x_outer,
        "x_inner": x_inner,
        "weight_stride": weight.stride(0),
        "TMA": config.tma,
        "PRECISION": common.precision(weight.dtype),
        "GROUP": config.group,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    finished = {
        **common.contiguous(bias=bias),
        **common.epilogue_arguments(x, residual_view, gamma, keep),
        "row_stats_out": row_stats,
        "ACTIVATION": activation,
    }
    if split.parts_of(config, depth)[0] > 1:
        finished |= {"out": out_rows, "affine": affine_rows}
        return out, split.plan(both | summed, both | finished, config)
    if out.element_size() == 4:  # twice the staging: flattened, 256 to 272 KB of shared memory
        config = replace(config, flatten=False, early=False)  # and twice a residual's registers
    # With affine, 128 columns of an fp32 output would ask for 96 KB of staging.
    columns = 128
    if affine is not None and config.tma:
        columns = 64 if out.element_size() == 4 else 128
    elif affine is not None:
        # Pointers to 64 spill 8 to 24 bytes on sm_100 and sm_120. Where an operand is read number
        # by number, 32 take 255 registers and spill 80 to 120 on sm_80 and sm_90, and 64 take 183.
        read = (x_view, weight, residual_view)
        columns = 32 if all(v is None or _by_vectors(v) for v in read) else 64
    if row_stats is not None:
        columns = STATS_COLUMNS
        # Four stages spill 8 bytes in fp16 on sm_100 under triton 3.8.
        config = replace(config, num_stages=min(config.num_stages, 3))
    epilogues = config.epilogues(columns)
    arguments = {
        **both,
        **summed,
        **finished,
        **_results(out_rows, affine_rows, config, config.block_n // epilogues),
        "EPILOGUES": epilogues,
        "FLATTEN": config.flatten,
        "EARLY": config.early and residual is not None,
    }
    tiles = triton.cdiv(outer * inner, config.block_m) * triton.cdiv(width, config.block_n)
    grid = (min(tiles, config.programs * common.multiprocessors(x)),)
    launch = common.Launch(_linear_kernel, grid, arguments, config.num_warps, config.num_stages)
    return out, (launch,)


def _tma_can_take(x_view: Tensor, weight: Tensor, out: Tensor, affine: Tensor | None) -> bool:
    """x must be one evenly spaced list of rows, and all of them describable."""
    return common.evenly_spaced(x_view) and all(
        common.describable(t)
        for t in (x_view.view(-1, x_view.shape[-1]), weight, out, affine)
        if t is not None
    )


def _by_vectors(view: Tensor) -> bool:
    """Whether Triton knows that rows start at 16 bytes: it looks at strides in elements."""
    return common.describable(view) and all(s % 16 == 0 for s in view.stride()[:-1])


def _factors(
    x_view: Tensor, weight: Tensor, config: linear_tiles.LinearConfig
) -> dict[str, object]:
    if not config.tma:
        return {"x": x_view, "weight": weight}
    rows = x_view.view(-1, x_view.shape[-1])
    return {
        "x": common.descriptor(rows, config.block_m, config.block_k),
        "weight": common.descriptor(weight, config.block_n, config.block_k),
    }


def _results(
    out: Tensor, affine: Tensor | None, config: linear_tiles.LinearConfig, columns: int
) -> dict[str, object]:
    if not config.tma:
        return {"out": out, "affine": affine}
    written = (config.block_m, columns)
    return {
        "out": common.descriptor(out, *written),
        "affine": None if affine is None else common.descriptor(affine, *written),
    }


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
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m0, n0 = common.tile_origin(tile, rows, width, BLOCK_M, BLOCK_N, GROUP)
        ahead = None
        if EARLY:
            row, col = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
            at = residual_at(residual, row, col, inner, residual_outer, residual_inner)
            mask = (row < rows)[:, None] & (col < width)[None, :]
            ahead = tl.load(at, mask=mask, other=0.0)
        acc = product(
            x,
            weight,
            m0,
            n0,
            0,
            depth,
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

        parts = common.column_parts(acc, EPILOGUES)
        if EARLY:
            early = common.column_parts(ahead, EPILOGUES)
        for part in tl.static_range(EPILOGUES):
            loaded = None
            if EARLY:
                loaded = early[part]
            epilogue(
                parts[part],
                bias,
                residual,
                loaded,
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
