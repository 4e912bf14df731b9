"""Backward of `linear`: an elementwise pass that leaves g and the column sums, then two products.

    g = keep * gamma * dout * act'(affine)       dbias = sum of g over rows
    dx = g @ W, dweight = g.T @ x                dgamma = sum of keep * dout * act(affine)

g could be computed as each product loads its operand instead. For T rows of M bf16 channels that
would read dout and affine twice, 8TM bytes (12TM where dout is fp32); the pass reads them once, and
g is written once and read twice: 10TM (12TM). The 2TM bytes at stake are 26 us for DeiT-B's
projection at batch 256, against 2 * 60 GFLOP of products (150 us at the fastest). For them the
products would evaluate erf and exp once for every tile an element is loaded into (3 to 6 times),
and send g through registers, where TMA feeds the matrix unit from shared memory. The column sums
take a pass over g in any case. Where nothing changes dout, as for the qkv projection, g is dout
itself, and the pass only reads it, for dbias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching, partials
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton_gradients as products


@launching.kept
def linear_bwd(
    dout: Tensor,
    x: Tensor | None,
    weight: Tensor,
    affine: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dgamma) of `deit.kernels.linear`, each as its forward argument.

    dout [..., M] in any floating-point dtype and strides; affine from `linear_fwd`. dbias is in x's
    dtype. Those not `wanted` are empty, and so is dgamma without gamma. Products accumulate in
    fp32, and in fp32 they are IEEE.
    """
    of_x, of_weight, of_bias, of_gamma = wanted or (True,) * 4
    g, dbias, dgamma = output_gradient(
        dout, weight.dtype, affine, activation, gamma, keep,
        of_g=of_x or of_weight, of_bias=of_bias, of_gamma=of_gamma,
    )  # fmt: skip
    dx, dweight = weight.new_empty(0), weight.new_empty(0)
    if of_x:
        dx = products.input_gradient(g, weight).view(*dout.shape[:-1], weight.shape[1])
    if of_weight:
        assert x is not None  # as the schema has it
        dweight = products.weight_gradient(g, x)
    return dx, dweight, dbias, dgamma


def output_gradient(
    dout: Tensor,
    dtype: torch.dtype,
    affine: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    *,
    of_g: bool = True,
    of_bias: bool = True,
    of_gamma: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """g [T, M] in `dtype`, dbias [M] in `dtype`, and dgamma, empty where gamma is None.

    g is dout itself where it may be. What is not asked for by an `of_` is empty, or g unwritten.
    """
    of_gamma = of_gamma and gamma is not None
    (g, parts), launch = plan(
        dout, dtype, affine, activation, gamma, keep, of_g=of_g, of_bias=of_bias, of_gamma=of_gamma
    )
    dbias = parts.new_empty(dout.shape[-1] if of_bias else 0, dtype=dtype)
    dgamma = dbias.new_empty(0)
    if gamma is not None and of_gamma:
        dgamma = gamma.new_empty(gamma.shape)
    if launch is None:
        return g, dbias.zero_(), dgamma.zero_()
    launch.run(dout)
    totals = [total for total, of in ((dbias, of_bias), (dgamma, of_gamma)) if of]
    if totals:
        partials.plan_sum(parts, *totals).run(dout)
    return g, dbias, dgamma


def plan(
    dout: Tensor,
    dtype: torch.dtype,
    affine: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    *,
    of_g: bool = True,
    of_bias: bool = True,
    of_gamma: bool = True,
    config: linear_tiles.OutputGradientConfig | None = None,
) -> tuple[tuple[Tensor, Tensor], common.Launch | None]:
    """g and partial sums [0 to 2, chunks, M] (dbias; dgamma), unwritten, and their launch.

    The launch is None where it would write nothing.
    """
    (view,) = common.as_rows(dout)
    outer, inner, width = view.shape
    rows = outer * inner
    config = config or linear_tiles.output_gradient(width)
    unchanged = activation is None and gamma is None and keep is None and dout.dtype == dtype
    as_it_is = unchanged and common.evenly_spaced(view) and common.describable(view.view(-1, width))
    g = view.view(-1, width) if as_it_is else dout.new_empty((rows, width), dtype=dtype)
    chunks = triton.cdiv(rows, config.chunk)
    of_gamma = of_gamma and gamma is not None
    parts = dout.new_empty((of_bias + of_gamma, chunks, width), dtype=torch.float32)
    writes_g = of_g and not as_it_is
    if dout.numel() == 0 or not (writes_g or of_bias or of_gamma):
        return (g, parts), None
    dout_outer, dout_inner = common.row_strides(view)
    needs_affine = activation is not None or of_gamma
    arguments = {
        "dout": view,
        **common.contiguous(affine=affine if needs_affine else None, gamma=gamma, keep=keep),
        "g": g if writes_g else None,
        "dbias": parts[0] if of_bias else None,
        "dgamma": parts[-1] if of_gamma else None,
        "rows": rows,
        "width": width,
        "inner": inner,
        "dout_outer": dout_outer,
        "dout_inner": dout_inner,
        "rows_per_sample": common.rows_per_sample(dout),
        "ACTIVATION": activation,
        "CHUNK": config.chunk,
        "BLOCK_R": config.rows,
        "BLOCK_N": config.columns,
    }
    grid = (chunks, triton.cdiv(width, config.columns))
    launch = common.Launch(_output_gradient_kernel, grid, arguments, config.num_warps)
    return (g, parts), launch


@triton.jit
def _output_gradient_kernel(
    dout,
    affine,
    gamma,
    keep,
    g,
    dbias,
    dgamma,
    rows,
    width,
    inner,
    dout_outer,
    dout_inner,
    rows_per_sample,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """CHUNK rows of BLOCK_N columns: g, and the sums over those rows."""
    chunk = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = col < width
    bias_sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    gamma_sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if gamma is not None:
        scale = tl.load(gamma + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    for first in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, rows), BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & col_mask[None, :]
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        dout_at = common.row_offsets(row, inner, dout_outer, dout_inner)[:, None] + col[None, :]
        d = tl.load(dout + dout_at, mask=mask, other=0.0).to(tl.float32)
        if keep is not None:
            factor = tl.load(keep + row // rows_per_sample, mask=row < rows, other=0.0)
            d *= factor.to(tl.float32)[:, None]
        if affine is not None:
            value = tl.load(affine + at, mask=mask, other=0.0).to(tl.float32)
            value, slope = common.activate_and_slope(affine, value, ACTIVATION, False)
            if dgamma is not None:
                gamma_sum += d * value
            if gamma is not None:
                d *= scale
            d *= slope
        elif gamma is not None:
            d *= scale
        if g is not None:
            tl.store(g + at, d.to(g.dtype.element_ty), mask=mask)
        bias_sum += d
    at = chunk.to(tl.int64) * width + col
    if dbias is not None:
        tl.store(dbias + at, tl.sum(bias_sum, 0), mask=col_mask)
    if dgamma is not None:
        tl.store(dgamma + at, tl.sum(gamma_sum, 0), mask=col_mask)
