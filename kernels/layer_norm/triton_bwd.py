"""Gradients of LayerNorm, alone and with the residual addition before it, and of RMSNorm.

One persistent kernel goes over the rows, several at a time, and reads each input once. With
x_hat = (s - mean) * rstd and g = weight * dout (arXiv 1607.06450, differentiated):

    ds = rstd * (g - mean(g) - x_hat * mean(g * x_hat))    dweight = sum(dout * x_hat)
    dbias = sum(dout)                                      dgamma = sum(keep * ds * x)

RMSNorm's x_hat is without the mean, and its ds without mean(g).

The sums over rows stay in registers, an fp32 tile a program, and are reduced once when its rows
are done; `partials` adds up the programs. Everything is fp32 between load and store.

Bytes, for T rows of D elements of e bytes: layer_norm 3 T D e (dout, x, dx); add_layer_norm
5 T D e (dout, dtotal, total, dx, dresidual), and T D e more with gamma (x). That is the floor.
Statistics and partial sums add 2 % at D = 192 and 1.6 % at 768 (batch 256, bf16, H100).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching, partials
from deit.kernels.layer_norm import tiles as layer_norm_tiles
from deit.kernels.layer_norm import triton as layer_norm


@launching.kept
def layer_norm_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    """(dx, dweight, dbias) in the dtypes of x and weight; those not `wanted` are empty."""
    planned = plan(
        dout, None, None, x, weight, mean, rstd, None, None,
        wanted=None if wanted is None else (False, *wanted, False),
    )  # fmt: skip
    return common.written(planned, x)[1:4]


@launching.kept
def rms_norm_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    """(dx, dweight), as `layer_norm_bwd`."""
    of_x, of_weight = wanted or (True, True)
    planned = plan(
        dout, None, None, x, weight, None, rstd, None, None,
        wanted=(False, of_x, of_weight, False, False),
    )  # fmt: skip
    return common.written(planned, x)[1:3]


@launching.kept
def add_layer_norm_bwd(
    dout: Tensor,
    dtotal: Tensor,
    x: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    """(dx, dresidual, dweight, dbias, dgamma).

    Those not `wanted` are empty, and so is dgamma without gamma.
    """
    planned = plan(dout, dtotal, x, total, weight, mean, rstd, gamma, keep, wanted=wanted)
    return common.written(planned, total)


def plan(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    *,
    wanted: Sequence[bool] | None = None,
    config: layer_norm_tiles.LayerNormBwdConfig | None = None,
) -> tuple[tuple[Tensor, ...], list[common.Launch]]:
    """(dx, dtotal's gradient through, dweight, dbias, dgamma), unwritten, and their launches.

    `total` is what was normalised, x the branch that was added, read for dgamma alone. For
    layer_norm, which adds nothing, dtotal is None and dx not `wanted`: the gradient at `total` is
    the second output. Sums for dweight and dbias are made where either is wanted. None: all.
    Without a mean the norm is RMSNorm.
    """
    dim, device = total.shape[-1], total.device
    wanted = wanted or (dtotal is not None, True, True, True, True)
    of_x, of_total, of_weight, of_bias, of_gamma = wanted
    of_gamma, of_parameters = of_gamma and gamma is not None, of_weight or of_bias
    dx = dout.new_empty(dout.shape if of_x else 0)
    dsum = torch.empty(total.shape if of_total else 0, dtype=total.dtype, device=device)
    dweight, dbias = (weight.new_empty(dim if of else 0) for of in (of_weight, of_bias))
    dgamma = weight.new_empty(0) if gamma is None else gamma.new_empty(dim if of_gamma else 0)
    outputs = dx, dsum, dweight, dbias, dgamma
    if total.numel() == 0 or not any((of_x, of_total, of_parameters, of_gamma)):
        for gradient in outputs[2:]:
            gradient.zero_()
        return outputs, []
    norm = layer_norm_tiles.rms_norm_bwd if mean is None else layer_norm_tiles.layer_norm_bwd
    config = config or norm(common.architecture(total), total.dtype, dim)
    if of_gamma and keep is not None and weight.element_size() == 2 and dim <= 256:
        config = layer_norm_tiles.halved(config)
    arguments = _views(dout, dtotal, x if of_gamma else None, total) | common.contiguous(
        weight=weight, mean=mean, rstd=rstd, gamma=gamma, keep=keep
    )
    blocks = triton.cdiv(total.numel() // dim, config.rows)
    programs = min(blocks, config.programs * common.multiprocessors(total))
    pair = [t if t.numel() else weight.new_empty(dim) for t in (dweight, dbias)]
    sums = [*(pair if of_parameters else ()), *((dgamma,) if of_gamma else ())]
    partial = torch.empty((len(sums), programs, dim), dtype=torch.float32, device=device)
    arguments |= {
        "dx": dx if of_x else None,
        "dsum": dsum if of_total else None,
        "partial": partial if of_parameters else None,
        "gamma_partial": partial[-1] if of_gamma else None,
        "rows": total.numel() // dim,
        "dim": dim,
        "rows_per_sample": common.rows_per_sample(total),
        "ROWS": config.rows,
        "BLOCK_D": triton.next_power_of_2(dim),
        "STAGES": config.num_stages,
    }
    launch = common.Launch(_backward_kernel, (programs,), arguments, config.num_warps)
    return outputs, [launch, partials.plan_sum(partial, *sums)] if sums else [launch]


def _views(dout: Tensor, dtotal: Tensor | None, x: Tensor | None, total: Tensor) -> dict[str, Any]:
    """The tensors of rows and their strides."""
    arguments: dict[str, Any] = {}
    names = ("dout", "dtotal", "x", "total")
    views = common.as_rows(dout, dtotal, x, total)
    for name, view in zip(names, views, strict=True):
        arguments[name] = view
        arguments[f"{name}_outer"], arguments[f"{name}_inner"] = common.row_strides(view)
    return arguments | {"inner": views[0].shape[1]}


@triton.jit
def _load(source, row, cols, mask, inner, outer_stride, inner_stride):
    at = common.row_offsets(row, inner, outer_stride, inner_stride)
    return tl.load(source + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _through_norm(dout, x_hat, weight, mean, rstd, dim):
    """The gradient at the norm's input, [ROWS, BLOCK_D]; `mean` is None for RMSNorm."""
    g = dout * weight[None, :]
    less = g
    if mean is not None:
        less = g - (tl.sum(g, axis=1) / dim)[:, None]
    slope = tl.sum(g * x_hat, axis=1) / dim
    return rstd[:, None] * (less - x_hat * slope[:, None])


@triton.jit
def _backward_kernel(
    dout,
    dtotal,
    x,
    total,
    weight,
    mean,
    rstd,
    gamma,
    keep,
    dx,
    dsum,
    partial,
    gamma_partial,
    rows,
    dim,
    inner,
    dout_outer,
    dout_inner,
    dtotal_outer,
    dtotal_inner,
    x_outer,
    x_inner,
    total_outer,
    total_inner,
    rows_per_sample,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < dim
    w = tl.load(weight + cols, mask=col_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if gamma is not None:
        scale = tl.load(gamma + cols, mask=col_mask, other=0.0).to(tl.float32)
    if gamma_partial is not None:
        dgamma = tl.zeros((ROWS, BLOCK_D), tl.float32)
    # STAGES: the next rows are on their way (cp.async) while these are worked on.
    for r0 in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = r0 + tl.arange(0, ROWS)
        row_mask = row < rows
        mask = row_mask[:, None] & col_mask[None, :]
        values = _load(total, row, cols, mask, inner, total_outer, total_inner)
        grad = _load(dout, row, cols, mask, inner, dout_outer, dout_inner)
        if mean is not None:
            row_mean = tl.load(mean + row, mask=row_mask, other=0.0)
            values = layer_norm.centre(values, row_mean, mask, dim)
        row_rstd = tl.load(rstd + row, mask=row_mask, other=0.0)
        x_hat = values * row_rstd[:, None]
        dweight += grad * x_hat
        dbias += grad
        ds = _through_norm(grad, x_hat, w, mean, row_rstd, dim)
        if dtotal is not None:
            ds += _load(dtotal, row, cols, mask, inner, dtotal_outer, dtotal_inner)
        out_at = row.to(tl.int64)[:, None] * dim + cols[None, :]
        if dsum is not None:
            tl.store(dsum + out_at, ds.to(dsum.dtype.element_ty), mask=mask)
        if keep is not None:
            factor = tl.load(keep + row // rows_per_sample, mask=row_mask, other=0.0)
            ds = ds * factor.to(tl.float32)[:, None]
        if gamma_partial is not None:
            dgamma += ds * _load(x, row, cols, mask, inner, x_outer, x_inner)
        if gamma is not None:
            ds = ds * scale[None, :]
        if dx is not None:
            tl.store(dx + out_at, ds.to(dx.dtype.element_ty), mask=mask)

    at = tl.program_id(0) * dim + cols
    if partial is not None:
        tl.store(partial + at, tl.sum(dweight, 0), mask=col_mask)
        tl.store(partial + tl.num_programs(0) * dim + at, tl.sum(dbias, 0), mask=col_mask)
    if gamma_partial is not None:
        tl.store(gamma_partial + at, tl.sum(dgamma, 0), mask=col_mask)
