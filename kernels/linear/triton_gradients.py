"""The matrix products of a linear layer's backward: dx = g @ W and dweight = g.T @ x.

Persistent kernels as `linear`'s, operands by tensor descriptors (TMA) on Hopper and data-centre
Blackwell and by pointers elsewhere. Nothing is transposed in memory: the matrix units take a
half-precision tile from shared memory in either order.

g [T, M] is the gradient at x @ W.T + bias, rounded once to x's dtype as PyTorch rounds it.
`linear_bwd` says why it is a matrix in memory and not computed as these kernels load it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, partials
from deit.kernels.linear import tiles as linear_tiles


def input_gradient(
    g: Tensor, weight: Tensor, *, config: linear_tiles.LinearConfig | None = None
) -> Tensor:
    """g [T, M] @ weight [M, K] -> [T, K], in g's dtype."""
    (out, _, _), launch = plan_input_gradient(g, weight, config=config)
    _launched(launch, out)
    return out


def hidden_gradient(
    g: Tensor,
    weight: Tensor,
    hidden: Tensor,
    activation: str = "gelu",
    *,
    of_weight: bool = True,
    of_bias: bool = True,
    config: linear_tiles.LinearConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through act too: d = (g @ weight) * act'(hidden), act(hidden), and d's column sums.

    hidden [T, K] contiguous in g's dtype, as both matrices that come back; the sums are [K]. The
    second is for the gradient of `weight`, the third for that of the bias before hidden: empty
    where those are not asked for.

    act(hidden), which dW2 needs, is written here since act' has its erf already: that costs
    the write, T * K elements (310 MB for DeiT-B at batch 256, 0.10 ms at 3 TB/s). Computed as
    dW2's operand is loaded, it would be computed once a block of dW2's rows, 6 times at D = 768,
    and pass through registers on its way to the matrix unit: some 25 instructions * 6 * T * K is
    0.8 ms of an H100's plain cores.
    """
    (out, activated, parts), launch = plan_input_gradient(
        g, weight, hidden, activation, of_weight=of_weight, of_bias=of_bias, config=config
    )
    activated = g.new_empty(0) if activated is None else activated
    total = g.new_empty(weight.shape[1] if of_bias else 0)
    _launched(launch, out, activated, total)
    if launch is not None and parts is not None:
        partials.plan_sum(parts, total).run(g)
    return out, activated, total


def weight_gradient(
    g: Tensor,
    x: Tensor,
    *,
    config: linear_tiles.LinearConfig | None = None,
    programs: int | None = None,
) -> Tensor:
    """g [T, M].T @ x [..., K] of T rows -> [M, K], in x's dtype.

    The sum over T rows is cut into `splits` parts where the tiles of [M, K] alone would leave
    multiprocessors idle (768 x 768 is 18 tiles for 132): each part is an fp32 matrix, and they are
    added in order. `programs` stands for the number of multiprocessors.
    """
    parts, launch = plan_weight_gradient(g, x, config=config, programs=programs)
    _launched(launch, parts)
    if parts.shape[0] == 1:
        return parts[0]
    total = x.new_empty(parts.shape[1:])
    partials.plan_sum(parts.view(1, parts.shape[0], -1), total).run(x)
    return total


def _launched(launch: common.Launch | None, *written: Tensor) -> None:
    """Run the launch; a product that sums nothing has none and is zeros."""
    if launch is not None:
        launch.run(written[0])
        return
    for tensor in written:
        tensor.zero_()


def plan_input_gradient(
    g: Tensor,
    weight: Tensor,
    hidden: Tensor | None = None,
    activation: str = "gelu",
    *,
    of_weight: bool = True,
    of_bias: bool = True,
    config: linear_tiles.LinearConfig | None = None,
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], common.Launch | None]:
    """(out, act(hidden), partial column sums), unwritten, and the launch that writes them.

    The last two are None without hidden and where they are not asked for, as in
    `hidden_gradient`; the launch is None where there is nothing to sum.
    """
    (rows, depth), width = g.shape, weight.shape[1]
    config = config or linear_tiles.input_gradient(
        common.architecture(g), g.dtype, width, depth, gelu=hidden is not None
    )
    out = g.new_empty((rows, width))
    activated = column_sums = None
    if hidden is not None:
        tiles_down = triton.cdiv(rows, config.block_m)
        if of_weight:
            activated = g.new_empty((rows, width))
        if of_bias:
            column_sums = g.new_empty((1, tiles_down, width), dtype=torch.float32)
    if out.numel() == 0 or depth == 0:
        return (out, activated, column_sums), None
    weight = common.last_contiguous(weight)
    if not all(common.describable(t) for t in (g, weight, out, hidden) if t is not None):
        config = config.without_tma()
    whole = config.tma or g.dtype == torch.float32
    columns = 128 if whole else 32
    if hidden is not None:  # 64 columns on sm_90: half the waits for tiles of hidden
        wide = config.tma and config.num_warps == 8 and common.architecture(g) == 90
        # 64 columns of the others spill 8 bytes in sm_100's tile.
        columns = 64 if wide and activation in ("gelu", "gelu_tanh") else 32
    epilogues = config.epilogues(columns)
    operands: dict[str, Any] = {
        "g": g,
        "weight": weight,
        "out": out,
        "hidden": hidden,
        "activated": activated,
    }
    if config.tma:
        part = (config.block_m, config.block_n // epilogues)
        blocks = {"g": (config.block_m, config.block_k), "weight": (config.block_k, config.block_n)}
        operands = {
            name: None if t is None else common.descriptor(t, *blocks.get(name, part))
            for name, t in operands.items()
        }
    arguments = {
        **operands,
        "column_sums": column_sums,
        "rows": rows,
        "width": width,
        "depth": depth,
        "g_stride": g.stride(0),
        "weight_stride": weight.stride(0),
        "ACTIVATION": activation,
        **_constants(config, g.dtype, epilogues),
    }
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)
    grid = (min(tiles, config.programs * common.multiprocessors(g)),)
    launch = common.Launch(
        _input_gradient_kernel, grid, arguments, config.num_warps, config.num_stages
    )
    return (out, activated, column_sums), launch


def plan_weight_gradient(
    g: Tensor,
    x: Tensor,
    *,
    config: linear_tiles.LinearConfig | None = None,
    programs: int | None = None,
) -> tuple[Tensor, common.Launch | None]:
    """[splits, M, K], unwritten, and the launch that writes it; None where there is nothing to sum.

    One split is the result, in x's dtype; several are fp32 parts of it.
    """
    (rows, width), depth = g.shape, x.shape[-1]
    if g.numel() == 0 or depth == 0:
        return x.new_empty((1, width, depth)), None
    config = config or linear_tiles.weight_gradient(common.architecture(g), g.dtype, width, depth)
    (x_view,) = common.as_rows(x)
    inner = x_view.shape[1]
    x_outer, x_inner = common.row_strides(x_view)
    tma = common.evenly_spaced(x_view) and all(
        common.describable(t) for t in (g, x_view.view(-1, depth))
    )
    if not tma:
        config = config.without_tma()
    programs = programs or config.programs * common.multiprocessors(g)
    tiles = triton.cdiv(width, config.block_m) * triton.cdiv(depth, config.block_n)
    steps = triton.cdiv(rows, config.block_k)
    split_steps = triton.cdiv(steps, linear_tiles.splits(tiles, steps, programs))
    splits = triton.cdiv(steps, split_steps)
    dtype = torch.float32 if splits > 1 else x.dtype
    out = torch.empty((splits, width, depth), dtype=dtype, device=x.device)
    operands: dict[str, Any] = {"g": g, "x": x_view}
    if config.tma:
        operands = {
            "g": common.descriptor(g, config.block_k, config.block_m),
            "x": common.descriptor(x_view.view(-1, depth), config.block_k, config.block_n),
        }
    arguments = {
        **operands,
        "out": out,
        "rows": rows,
        "width": width,
        "depth": depth,
        "splits": splits,
        "split_rows": split_steps * config.block_k,
        "inner": inner,
        "g_stride": g.stride(0),
        "x_outer": x_outer,
        "x_inner": x_inner,
        **_constants(config, g.dtype, config.epilogues(64 if g.dtype == torch.float32 else 32)),
    }
    grid = (min(tiles * splits, programs),)
    return out, common.Launch(
        _weight_gradient_kernel, grid, arguments, config.num_warps, config.num_stages
    )


def _constants(
    config: linear_tiles.LinearConfig, dtype: torch.dtype, epilogues: int
) -> dict[str, object]:
    return {
        "TMA": config.tma,
        "PRECISION": common.precision(dtype),
        "GROUP": config.group,
        "EPILOGUES": epilogues,
        "FLATTEN": config.flatten,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


@triton.jit
def _through_activation(
    acc,
    hidden,
    activated,
    column_sums,
    m0,
    n0,
    tile_row,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Multiply by act'(hidden); write act(hidden) and the product's column sums, if asked."""
    col = n0 + tl.arange(0, acc.shape[1])
    if TMA:
        h = hidden.load([m0, n0])
    else:
        row = m0 + tl.arange(0, acc.shape[0])
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        h = tl.load(hidden + at, mask=(row < rows)[:, None] & (col < width)[None, :], other=0.0)
    value, slope = common.activate_and_slope(hidden, h.to(tl.float32), ACTIVATION, TMA)
    if activated is not None:
        common.store_tile(activated, value, m0, n0, rows, width, TMA)
    acc *= slope
    if column_sums is not None:  # rows past the last are zeros: g was read as zeros there
        at = column_sums + tile_row.to(tl.int64) * width + col
        tl.store(at, tl.sum(acc, 0), mask=col < width)
    return acc


@triton.jit
def _input_gradient_kernel(
    g,
    weight,
    hidden,
    out,
    activated,
    column_sums,
    rows,
    width,
    depth,
    g_stride,
    weight_stride,
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
    """out [rows, width] = g [rows, depth] @ weight [depth, width]."""
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m0, n0 = common.tile_origin(tile, rows, width, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            for k0 in tl.range(0, depth, BLOCK_K):
                a = g.load([m0, k0])
                b = weight.load([k0, n0])
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
        else:
            row = m0 + tl.arange(0, BLOCK_M)
            col = n0 + tl.arange(0, BLOCK_N)
            ks = tl.arange(0, BLOCK_K)
            a_at = g + row.to(tl.int64)[:, None] * g_stride + ks[None, :]
            b_at = weight + ks.to(tl.int64)[:, None] * weight_stride + col[None, :]
            for k0 in tl.range(0, depth, BLOCK_K):
                k_mask = ks < depth - k0
                a = tl.load(a_at, mask=(row < rows)[:, None] & k_mask[None, :], other=0.0)
                b = tl.load(b_at, mask=k_mask[:, None] & (col < width)[None, :], other=0.0)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
                a_at += BLOCK_K
                b_at += BLOCK_K * weight_stride

        parts = common.column_parts(acc, EPILOGUES)
        for part in tl.static_range(EPILOGUES):
            n = n0 + part * (BLOCK_N // EPILOGUES)
            d = parts[part]
            if hidden is not None:
                d = _through_activation(
                    d,
                    hidden,
                    activated,
                    column_sums,
                    m0,
                    n,
                    m0 // BLOCK_M,
                    rows,
                    width,
                    ACTIVATION,
                    TMA,
                )
            common.store_tile(out, d, m0, n, rows, width, TMA)


@triton.jit
def _weight_gradient_kernel(
    g,
    x,
    out,
    rows,
    width,
    depth,
    splits,
    split_rows,
    inner,
    g_stride,
    x_outer,
    x_inner,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    EPILOGUES: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [splits, width, depth]: g [rows, width].T @ x [rows, depth], split_rows rows each.

    The tiles of one split run together, so they share its rows of g and x in L2.
    """
    tiles = tl.cdiv(width, BLOCK_M) * tl.cdiv(depth, BLOCK_N)
    for unit in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), flatten=FLATTEN):
        split = unit // tiles
        m0, n0 = common.tile_origin(unit % tiles, width, depth, BLOCK_M, BLOCK_N, GROUP)
        first = split * split_rows
        last = tl.minimum(first + split_rows, rows)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            # split_rows is a multiple of BLOCK_K: only the last split reads past its end, zeros.
            for k0 in tl.range(first, last, BLOCK_K):
                a = g.load([k0, m0])
                b = x.load([k0, n0])
                acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        else:
            m = m0 + tl.arange(0, BLOCK_M)
            n = n0 + tl.arange(0, BLOCK_N)
            ks = tl.arange(0, BLOCK_K)
            for k0 in tl.range(first, last, BLOCK_K):
                row = k0 + ks
                mask = (row < last)[:, None]
                a_at = g + row.to(tl.int64)[:, None] * g_stride + m[None, :]
                b_at = x + common.row_offsets(row, inner, x_outer, x_inner)[:, None] + n[None, :]
                a = tl.load(a_at, mask=mask & (m < width)[None, :], other=0.0)
                b = tl.load(b_at, mask=mask & (n < depth)[None, :], other=0.0)
                acc = tl.dot(a.T, b, acc, input_precision=PRECISION)

        at = out + split.to(tl.int64) * width * depth
        parts = common.column_parts(acc, EPILOGUES)
        for part in tl.static_range(EPILOGUES):
            n_part = n0 + part * (BLOCK_N // EPILOGUES)
            common.store_tile(at, parts[part], m0, n_part, width, depth, False)
