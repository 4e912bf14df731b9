"""act(LN(x) @ weight.T + bias): a LayerNorm that is its product's prologue, or a kernel before it.

By panel, for narrow rows: a program normalises its rows of x once, keeps them in shared memory,
and passes over the output's columns; x is read once, and only weight comes from L2 again (0.2 MB
of qkv's for every 128 rows at D = 192). For wider rows, and where descriptors cannot be used,
LayerNorm is a kernel of its own. A third form, tiles of x normalised for every tile of output,
lost: a block of DeiT-B took 1.25 times as long so (docs/performance.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.layer_norm import triton as layer_norm
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as linear
from deit.kernels.linear import triton_row_stats as statistics


def norm_linear(
    x: Tensor,
    norm: statistics.Norm,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    config: linear_tiles.PanelConfig | None,
) -> Tensor:
    """act(LN(x) @ weight.T + bias), in weight's dtype; x in that or fp32.

    LN(x) is rounded to weight's dtype before the product, in either form. It runs by panel where
    `config` is one and its descriptors can take the tensors. No other form reads row statistics,
    so missing ones are not computed for it.
    """
    if config is not None:
        complete, statistics_launch = statistics.completed(norm, x)
        planned = plan(x, complete, weight, bias, activation, config=config)
        if planned is not None:
            out, launch = planned
            return common.written((out, (statistics_launch, launch)), x)
    normed = layer_norm.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype=weight.dtype)
    return linear.linear(normed, weight, bias, activation, None, None, None)


def plan(
    x: Tensor,
    norm: statistics.Norm,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    *,
    config: linear_tiles.PanelConfig,
) -> tuple[Tensor, common.Launch] | None:
    """The output, unwritten, and the launch by panel; None where it cannot run.

    It cannot where D is not 3 * config.chunk, a tensor is empty, x is not one evenly spaced list
    of rows, or an address or stride is not a multiple of 16 bytes.
    """
    width, dim = weight.shape
    if dim != 3 * config.chunk or x.numel() == 0 or weight.numel() == 0:
        return None
    (x_view,) = common.as_rows(x)
    weight = common.last_contiguous(weight)
    if not common.evenly_spaced(x_view):
        return None
    rows = x_view.view(-1, dim)
    out = torch.empty((*x.shape[:-1], width), dtype=weight.dtype, device=x.device)
    out_rows = out.view(-1, width)
    if not all(common.describable(t) for t in (rows, weight, out_rows)):
        return None
    panels, tiles = (
        triton.cdiv(rows.shape[0], config.block_m),
        triton.cdiv(width, config.block_n),
    )
    programs = common.multiprocessors(x)
    split_tiles = triton.cdiv(tiles, splits(panels, tiles, programs))
    count = triton.cdiv(tiles, split_tiles)
    arguments = {
        "x": common.descriptor(rows, config.block_m, config.chunk),
        "weight": common.descriptor(weight, config.block_n, config.chunk),
        **common.contiguous(bias=bias),
        **statistics.prologue(norm, dim),
        "out": common.descriptor(out_rows, config.block_m, config.block_n),
        "rows": rows.shape[0],
        "width": width,
        "splits": count,
        "split_width": split_tiles * config.block_n,
        "ACTIVATION": activation,
        "CHUNK": config.chunk,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    grid = (min(panels * count, programs),)
    return out, common.Launch(_panel_kernel, grid, arguments, config.num_warps, config.num_stages)


def splits(panels: int, tiles: int, programs: int) -> int:
    """Into how many parts to cut the output's columns, each with the panel loaded again.

    The least work for the busiest of `programs`, in tiles; loading a panel counts as one.
    """
    return min(range(1, tiles + 1), key=lambda n: -(-panels * n // programs) * (-(-tiles // n) + 1))


@triton.jit
def _panel_kernel(
    x,
    weight,
    bias,
    row_stats,
    norm_weight,
    norm_bias,
    eps,
    out,
    rows,
    width,
    splits,
    split_width,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Carried by the loop, the panel is kept in shared memory; see gelu_mlp/triton.py.
    x0, x1, x2 = statistics.chunks(
        x,
        tl.program_id(0) // splits * BLOCK_M,
        row_stats,
        norm_weight,
        norm_bias,
        rows,
        eps,
        weight.dtype,
        CHUNK,
        BLOCK_M,
        PARTS,
    )
    for unit in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * splits, tl.num_programs(0)):
        m0 = unit // splits * BLOCK_M
        first = unit % splits * split_width
        for n0 in tl.range(first, tl.minimum(first + split_width, width), BLOCK_N):
            # Copies that are loaded beside one another are awaited together.
            w0, w1, w2 = (
                weight.load([n0, 0]),
                weight.load([n0, CHUNK]),
                weight.load([n0, 2 * CHUNK]),
            )
            acc = tl.dot(x0, w0.T)
            acc = tl.dot(x1, w1.T, acc)
            acc = tl.dot(x2, w2.T, acc)
            if bias is not None:
                col = n0 + tl.arange(0, BLOCK_N)
                acc += tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
            acc = common.activate(out, acc, ACTIVATION, True)
            out.store([m0, n0], acc.to(out.dtype))
        x0, x1, x2 = statistics.chunks(
            x,
            (unit + tl.num_programs(0)) // splits * BLOCK_M,
            row_stats,
            norm_weight,
            norm_bias,
            rows,
            eps,
            weight.dtype,
            CHUNK,
            BLOCK_M,
            PARTS,
        )
