"""act(x @ weight.T + bias) of factors in e4m3, finished in its epilogue, in fp32.

The persistent kernel of `linear`, 128 of the sum at a time. On Hopper the tensor cores add products
of e4m3 with some 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2: errors of 2 % at a depth of
4096), so each 128 is a product of its own, added to fp32 accumulators outside. That is one addition
for 128 multiply-adds, of which a matrix unit does 32 to a core's one. The scale of a row and 128
channels comes in there: a multiply-add by that scale takes the addition's place.

What it writes is a matrix in x's dtype, or the next product's x: e4m3 with scales (`Rows`). Both
factors have whole groups of 128 in memory, so a descriptor can always be made of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.device.interpreter import interpreted
from deit.kernels.fp8 import tiles as fp8_tiles
from deit.kernels.fp8 import triton_rows as fp8_rows
from deit.kernels.fp8.quantize import GROUP
from deit.kernels.fp8.triton_rows import Rows
from deit.kernels.linear import triton_tile

_GROUP = tl.constexpr(GROUP)


class Weight(NamedTuple):
    """A weight [M, K] in e4m3 [M, C * 128], zeros behind K, and its scales [M] in fp32."""

    e4m3: Tensor
    scales: Tensor


def plan_hidden(
    x: Rows,
    weight: Weight,
    bias: Tensor | None,
    *,
    config: fp8_tiles.Fp8Config | None = None,
) -> tuple[Rows, common.Launch | None]:
    """gelu(x @ weight.T + bias) in e4m3, unwritten, and the launch that writes it."""
    rows, width = x.e4m3.shape[0], weight.e4m3.shape[0]
    out = fp8_rows.empty(rows, width, x.e4m3.device)
    if rows == 0:
        return out, None
    epilogue = _epilogue(bias, "gelu", None, None)
    return out, _launch(x, weight, out.e4m3, out.scales, epilogue, config)


def plan(
    x: Rows,
    weight: Weight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    out: Tensor,
    *,
    config: fp8_tiles.Fp8Config | None = None,
) -> common.Launch | None:
    """The launch that writes residual + gamma * act(x @ weight.T + bias) to `out`; None for empty.

    out, residual: [..., M] of as many rows as x has, out contiguous.
    """
    if out.numel() == 0:
        return None
    epilogue = _epilogue(bias, activation, residual, gamma)
    return _launch(x, weight, out.view(-1, out.shape[-1]), None, epilogue, config)


def _epilogue(
    bias: Tensor | None, activation: str | None, residual: Tensor | None, gamma: Tensor | None
) -> dict[str, Any]:
    (view,) = common.as_rows(residual)
    outer, inner = common.row_strides(view)
    return {
        **common.contiguous(bias=bias, gamma=gamma),
        "residual": view,
        "residual_outer": outer,
        "residual_inner": inner,
        "inner": 1 if view is None else view.shape[1],
        "ACTIVATION": activation,
    }


def _launch(
    x: Rows,
    weight: Weight,
    out: Tensor,
    out_scales: Tensor | None,
    epilogue: dict[str, Any],
    config: fp8_tiles.Fp8Config | None,
) -> common.Launch:
    (rows, depth), width = x.e4m3.shape, weight.e4m3.shape[0]
    config = config or fp8_tiles.fp8_product(common.architecture(out), out.dtype, width, depth)
    out_tma = config.tma and common.describable(out)
    # Pointers to 128 columns spill 304 bytes on sm_90; e4m3 has a scale for 128.
    columns = GROUP if out_tma or out_scales is not None else 32
    parts = config.block_n // columns
    operands: dict[str, Any] = {"x": x.e4m3, "weight": weight.e4m3, "out": out}
    if config.tma:
        operands["x"] = common.descriptor(x.e4m3, config.block_m, GROUP)
        operands["weight"] = common.descriptor(weight.e4m3, GROUP, GROUP)
    if out_tma:
        operands["out"] = common.descriptor(out, config.block_m, config.block_n // parts)
    arguments = {
        **operands,
        "x_scales": x.scales,
        "weight_scales": weight.scales,
        **epilogue,
        "out_scales": out_scales,
        "rows": rows,
        "width": width,
        "depth": depth,
        "TMA": config.tma,
        "OUT_TMA": out_tma,
        "ROUNDS_FIRST": interpreted(),
        "GROUP": config.group,
        "FLATTEN": config.flatten,
        "PARTS": parts,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)
    grid = (min(tiles, common.multiprocessors(out)),)
    return common.Launch(_fp8_product_kernel, grid, arguments, config.num_warps, config.num_stages)


@triton.jit
def _gelu(x):
    """x * Phi(x) to 2.3e-6 of it, as `common.gelu_into` of higher degree.

    Its 1.2e-4 would take one number in a thousand to e4m3's next, and a third of the rows with
    them. By erf GELU is 44 instructions an element, 14 of which move erf's coefficients; so it is
    21. The polynomial is in |x| - 2.5, where its terms do not cancel.
    """
    a = tl.minimum(tl.abs(x), 5.0)
    u = a - 2.5
    root = 0.8493218002880191 * x  # sqrt(log2(e) / 2)
    ratio = -5.840607286700106e-08 * u + 3.2626320489725913e-07
    ratio = ratio * u - 5.428444751487405e-07
    ratio = ratio * u + 1.875646375992801e-06
    ratio = ratio * u - 1.4787273357796948e-05
    ratio = ratio * u + 6.693361501675099e-05
    ratio = ratio * u - 0.0002577416889835149
    ratio = ratio * u + 0.0010109584545716643
    ratio = ratio * u - 0.003830085275694728
    ratio = ratio * u + 0.013651634566485882
    ratio = ratio * u - 0.04561440274119377
    ratio = ratio * u + 0.14133106172084808
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive - a * tl.math.exp2(-(root * root)) * ratio


@triton.jit
def _hidden(
    acc,
    bias,
    out,
    out_scales,
    m0,
    n0,
    rows,
    width,
    TMA: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    """gelu(acc + bias), 128 columns of it, to e4m3 and its scales.

    Columns past the last are zeros, because weight's rows there are.
    """
    col = n0 + tl.arange(0, _GROUP)
    if bias is not None:
        acc += tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    blocks = _gelu(acc).reshape(acc.shape[0], 1, _GROUP)
    e4m3, scale = fp8_rows.quantise(blocks, ROUNDS_FIRST)
    padded = tl.cdiv(width, _GROUP) * _GROUP
    common.store_tile(out, e4m3.reshape(acc.shape[0], _GROUP), m0, n0, rows, padded, TMA)
    row = m0 + tl.arange(0, acc.shape[0])
    at = (n0 // _GROUP).to(tl.int64) * rows + row
    inside = row < tl.where(n0 < width, rows, 0)  # a tile's right half may be past the last group
    tl.store(out_scales + at, scale.reshape(acc.shape[0]), mask=inside)


@triton.jit
def _fp8_product_kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    residual,
    gamma,
    out,
    out_scales,
    rows,
    width,
    depth,
    inner,
    residual_outer,
    residual_inner,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m0, n0 = common.tile_origin(tile, rows, width, BLOCK_M, BLOCK_N, GROUP)
        row = m0 + tl.arange(0, BLOCK_M)
        row_mask = row < rows
        scale_at = x_scales + row
        left = tl.zeros((BLOCK_M, _GROUP), tl.float32)
        right = left  # of a tile of 256: a product at a time is in registers beside the sums
        if not TMA:
            col = n0 + tl.arange(0, _GROUP)
            ks = tl.arange(0, _GROUP)
            a_at = x + row.to(tl.int64)[:, None] * depth + ks[None, :]
            b_at = weight + col.to(tl.int64)[:, None] * depth + ks[None, :]
        for k0 in tl.range(0, depth, _GROUP):
            scale = tl.load(scale_at, mask=row_mask, other=0.0)[:, None]
            scale_at += rows
            if TMA:
                a = x.load([m0, k0])
                left += tl.dot(a, weight.load([n0, k0]).T) * scale
                if BLOCK_N > _GROUP:
                    right += tl.dot(a, weight.load([n0 + _GROUP, k0]).T) * scale
            else:
                a = tl.load(a_at + k0, mask=row_mask[:, None], other=0.0)
                b = tl.load(b_at + k0, mask=(col < width)[:, None], other=0.0)
                left += tl.dot(a, b.T) * scale

        HALVES: tl.constexpr = BLOCK_N // _GROUP
        parts = common.column_parts(left, PARTS // HALVES)
        if HALVES > 1:
            parts = parts + common.column_parts(right, PARTS // HALVES)
        for part in tl.static_range(PARTS):
            n = n0 + part * (BLOCK_N // PARTS)
            col = n + tl.arange(0, BLOCK_N // PARTS)
            scaled = (
                parts[part] * tl.load(weight_scales + col, mask=col < width, other=0.0)[None, :]
            )
            if out_scales is not None:
                _hidden(scaled, bias, out, out_scales, m0, n, rows, width, OUT_TMA, ROUNDS_FIRST)
            else:
                triton_tile.epilogue(
                    scaled,
                    bias,
                    residual,
                    None,
                    gamma,
                    None,
                    out,
                    None,
                    None,
                    m0,
                    n,
                    rows,
                    width,
                    inner,
                    residual_outer,
                    residual_inner,
                    1,
                    ACTIVATION,
                    OUT_TMA,
                )
