"""LayerNorm over rows, alone and fused with the residual addition before it, and RMSNorm.

A program takes several rows at once, reads each element once, and keeps the rows in registers
for the statistics' two passes: the mean, then the variance of the centred values (arXiv
1607.06450). E[x^2] - E[x]^2 would cancel for inputs with a large mean. All fp32.

Bytes moved are the floor: each input read once, each output written once. Training adds 8 a row:
`_fwd` also writes mean and rstd, fp32, for triton_bwd.py. RMSNorm (arXiv 1910.07467) is LayerNorm's
kernel with CENTRED off: nothing is taken off the rows, and no mean is saved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching
from deit.kernels.layer_norm import tiles as layer_norm_tiles


@launching.kept
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    config: layer_norm_tiles.LayerNormConfig | None = None,
) -> Tensor:
    """`deit.kernels.layer_norm` on Triton; the last axis is made contiguous, others stay.

    dtype: of the output, x's by default.
    """
    planned = plan_layer_norm(x, weight, bias, eps, dtype=dtype, config=config)
    return common.written(planned, x)[0]


@launching.kept
def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """As `layer_norm`; (out, mean, rstd), the statistics fp32 of x.shape[:-1]."""
    return common.written(plan_layer_norm(x, weight, bias, eps, save=True), x)


@launching.kept
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`deit.kernels.rms_norm` on Triton; strides as for `layer_norm`."""
    return common.written(plan_layer_norm(x, weight, None, eps, centred=False), x)[0]


@launching.kept
def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """As `rms_norm`; (out, rstd), fp32 of x.shape[:-1]."""
    return common.written(plan_layer_norm(x, weight, None, eps, centred=False, save=True), x)


@launching.kept
def add_layer_norm(
    x: Tensor, *rest: Any, config: layer_norm_tiles.LayerNormConfig | None = None
) -> tuple[Tensor, Tensor]:
    """`deit.kernels.add_layer_norm` on Triton; LN sees the sum before it is rounded."""
    out, total, *_ = common.written(plan_add_layer_norm(x, *rest, config=config), x)
    return out, total


@launching.kept
def add_layer_norm_fwd(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As `add_layer_norm`; (out, total, mean, rstd)."""
    return common.written(plan_add_layer_norm(x, *rest, save=True), x)


def plan_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool = True,
    save: bool = False,
    dtype: torch.dtype | None = None,
    config: layer_norm_tiles.LayerNormConfig | None = None,
) -> tuple[tuple[Tensor, ...], common.Launch | None]:
    """The outputs, unwritten, and the launch that writes them; None for an empty input.

    `centred`: LayerNorm, else RMSNorm. `save`: mean and rstd are outputs too, of RMSNorm rstd
    alone. `dtype`: of the first output, x's by default.
    """
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    mean, rstd = _statistics(x) if save else (None, None)
    statistics = (mean, rstd) if centred else (rstd,)
    outputs = (out, *(t for t in statistics if t is not None))
    if out.numel() == 0:
        return outputs, None
    dim = x.shape[-1]
    config = config or layer_norm_tiles.layer_norm(common.architecture(x), x.dtype, dim)
    (view,) = common.as_rows(x)
    arguments = _row_arguments(view, dim, eps, config) | common.contiguous(weight=weight, bias=bias)
    arguments |= _statistics_arguments(mean if centred else None, rstd)
    arguments |= {"out": out, "CENTRED": centred}
    grid = (triton.cdiv(arguments["rows"], config.rows),)
    launch = common.Launch(_layer_norm_kernel, grid, arguments, config.num_warps)
    return outputs, launch


def plan_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
    *,
    save: bool = False,
    config: layer_norm_tiles.LayerNormConfig | None = None,
) -> tuple[tuple[Tensor, ...], common.Launch | None]:
    """As `plan_layer_norm`, for (LN(s), s)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    statistics = _statistics(x) if save else ()
    if out.numel() == 0:
        return (out, total, *statistics), None
    dim = x.shape[-1]
    config = config or layer_norm_tiles.layer_norm(common.architecture(x), x.dtype, dim)
    view, residual_view = common.as_rows(x, residual)
    if view.shape[1] > 1:  # beside the addresses of rows at two distances
        config = layer_norm_tiles.halved(config)
    arguments = {
        **_row_arguments(view, dim, eps, config),
        **common.contiguous(weight=weight, bias=bias),
        **common.epilogue_arguments(x, residual_view, gamma, keep),
        **_statistics_arguments(*statistics),
        "out": out,
        "total": total,
    }
    grid = (triton.cdiv(arguments["rows"], config.rows),)
    launch = common.Launch(_add_layer_norm_kernel, grid, arguments, config.num_warps)
    return (out, total, *statistics), launch


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where mean and rstd of every row go."""
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    return mean, rstd


def _statistics_arguments(
    mean: Tensor | None = None, rstd: Tensor | None = None
) -> dict[str, Tensor | None]:
    return {"mean_out": mean, "rstd_out": rstd}


def _row_arguments(
    view: Tensor, dim: int, eps: float, config: layer_norm_tiles.LayerNormConfig
) -> dict[str, Any]:
    return common.row_arguments(view) | {
        "eps": float(eps),
        "ROWS": config.rows,
        "BLOCK_D": triton.next_power_of_2(dim),
    }


@triton.jit
def centre(x, mean, mask, dim):
    """x [ROWS, BLOCK_D] less its mean, zero outside the mask.

    The mean is off by up to half an ulp of itself: at a mean of 1000 that is 3e-5 of a
    standard deviation of 1, and all of the error. The centred values show it, so they are
    centred again. A saved mean has the same ulp, and the backward pass the same correction.
    """
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return tl.where(mask, centred - (tl.sum(centred, axis=1) / dim)[:, None], 0.0)


@triton.jit
def normalise(
    x,
    mask,
    weight,
    bias,
    mean_out,
    rstd_out,
    row,
    row_mask,
    cols,
    dim,
    eps,
    CENTRED: tl.constexpr = True,
):
    """LN of x [ROWS, BLOCK_D], zero outside the mask; fp32 throughout. Not CENTRED: RMSNorm."""
    centred = x
    if CENTRED:
        mean = tl.sum(x, axis=1) / dim
        centred = centre(x, mean, mask, dim)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, axis=1) / dim + eps)
    if mean_out is not None:
        tl.store(mean_out + row, mean, mask=row_mask)
    if rstd_out is not None:
        tl.store(rstd_out + row, rstd, mask=row_mask)
    y = centred * rstd[:, None]
    y = y * tl.load(weight + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _layer_norm_kernel(
    x,
    weight,
    bias,
    out,
    mean_out,
    rstd_out,
    rows,
    dim,
    inner,
    x_outer,
    x_inner,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTRED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    row_mask = row < rows
    mask = row_mask[:, None] & (cols < dim)[None, :]
    at = common.row_offsets(row, inner, x_outer, x_inner)
    values = tl.load(x + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = normalise(
        values, mask, weight, bias, mean_out, rstd_out, row, row_mask, cols, dim, eps, CENTRED
    )
    out_at = row.to(tl.int64)[:, None] * dim + cols[None, :]
    tl.store(out + out_at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_layer_norm_kernel(
    x,
    residual,
    weight,
    bias,
    gamma,
    keep,
    out,
    total,
    mean_out,
    rstd_out,
    rows,
    dim,
    inner,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    rows_per_sample,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    row_mask, col_mask = row < rows, cols < dim
    mask = row_mask[:, None] & col_mask[None, :]
    at = common.row_offsets(row, inner, x_outer, x_inner)
    values = tl.load(x + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    residual_at = common.row_offsets(row, inner, residual_outer, residual_inner)
    values = common.add_residual(
        values,
        residual + residual_at[:, None] + cols[None, :],
        gamma,
        keep,
        row,
        cols,
        row_mask,
        col_mask,
        rows_per_sample,
    )
    out_at = row.to(tl.int64)[:, None] * dim + cols[None, :]
    tl.store(total + out_at, values.to(total.dtype.element_ty), mask=mask)
    y = normalise(values, mask, weight, bias, mean_out, rstd_out, row, row_mask, cols, dim, eps)
    tl.store(out + out_at, y.to(out.dtype.element_ty), mask=mask)
