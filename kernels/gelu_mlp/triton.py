"""The transformer's MLP: in one kernel that keeps the hidden layer on chip, or in two products.

The one-kernel form holds block_m rows of x, passes over the hidden layer block_h channels at a
time, and multiplies each block by fc2 as soon as it is there; the hidden layer, four times as
wide as x, never exists in memory. Its tiles are powers of two and every DeiT width is three
times one, so D is held as three chunks. Elsewhere the MLP is two launches of `linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.linear import triton as linear_module
from deit.kernels.linear import triton_row_stats as statistics
from deit.kernels.linear.row_stats import STATS_COLUMNS


@launching.kept
def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    activation: str | None = None,
    *,
    config: gelu_mlp_tiles.MlpConfig | None = None,
) -> Tensor:
    """`deit.kernels.gelu_mlp` on Triton; strides, and the epilogue, as for `linear`.

    The one-kernel form runs where `gelu_mlp_tiles.gelu_mlp` has an entry (or `config` is given) and
    the tensors are what its descriptors can take: `single_kernel` says.
    """
    epilogue, activation = (residual, gamma, keep), activation or "gelu"
    if config is None:
        config = gelu_mlp_tiles.gelu_mlp(*gelu_mlp_tiles.asked(x))
    if config is not None:
        planned = plan(x, w1, b1, w2, b2, *epilogue, activation, config=config)
        if planned is not None:
            return common.written(planned, x)
    hidden = linear_module.linear(x, w1, b1, activation, None, None, None)
    return linear_module.linear(hidden, w2, b2, None, *epilogue)


@launching.kept
def gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gelu_mlp`, the hidden layer before its activation, and fc2's output for gamma, else empty.

    Two products: the one-kernel form never has the hidden layer in memory, and here it must be.
    """
    first = activation or "gelu"
    activated, hidden = linear_module.linear_fwd(x, w1, b1, first, None, None, None)
    out, affine = linear_module.linear_fwd(activated, w2, b2, None, residual, gamma, keep)
    return out, hidden, affine


def plan(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    activation: str = "gelu",
    *,
    norm: statistics.Norm | None = None,
    row_stats: Tensor | None = None,
    config: gelu_mlp_tiles.MlpConfig,
) -> tuple[Tensor, common.Launch] | None:
    """The output, unwritten, and the launch of the one-kernel form; None where it cannot run.

    It cannot where D or D' is not 3 * config.chunk, a tensor is empty, x is not one evenly
    spaced list of rows, or an address or stride is not a multiple of 16 bytes. Nor can it write
    row statistics of chunks that are no whole number of their parts.

    norm: the LayerNorm of x, which is then in w1's dtype or fp32; its row statistics are read.
    row_stats: as for `linear.plan`.
    """
    hidden, dim = w1.shape
    if (dim, w2.shape[0]) != (3 * config.chunk, 3 * config.chunk) or x.numel() == 0:
        return None
    if row_stats is not None and config.chunk % STATS_COLUMNS:
        return None
    x_view, residual_view = common.as_rows(x, residual)
    w1, w2 = common.last_contiguous(w1), common.last_contiguous(w2)
    if not common.evenly_spaced(x_view):
        return None
    rows = x_view.view(-1, dim)
    if not all(common.describable(t) for t in (rows, w1, w2)):
        return None
    dtype = w2.dtype if residual is None else residual.dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    arguments = {
        "x": common.descriptor(rows, config.block_m, config.chunk),
        "w1": common.descriptor(w1, config.block_h, config.chunk),
        "w2": common.descriptor(w2, config.chunk, config.block_h),
        **common.contiguous(b1=b1, b2=b2),
        **common.epilogue_arguments(x, residual_view, gamma, keep),
        **statistics.prologue(norm, dim),
        "out": common.descriptor(out.view(-1, dim), config.block_m, config.chunk),
        "row_stats_out": row_stats,
        "rows": rows.shape[0],
        "hidden": hidden,
        "inner": x_view.shape[1],
        "ACTIVATION": activation,
        "CHUNK": config.chunk,
        "BLOCK_M": config.block_m,
        "BLOCK_H": config.block_h,
    }
    grid = (min(triton.cdiv(rows.shape[0], config.block_m), common.multiprocessors(x)),)
    return out, common.Launch(
        _gelu_mlp_kernel, grid, arguments, config.num_warps, config.num_stages
    )


@triton.jit
def _finish(
    acc,
    chunk,
    b2,
    residual,
    gamma,
    keep,
    out,
    row_stats_out,
    m0,
    rows,
    inner,
    residual_outer,
    residual_inner,
    rows_per_sample,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The epilogue of one chunk of output channels."""
    row = m0 + tl.arange(0, BLOCK_M)
    col = chunk * CHUNK + tl.arange(0, CHUNK)
    row_mask = row < rows
    if b2 is not None:
        acc += tl.load(b2 + col).to(tl.float32)[None, :]
    added = None
    if residual is not None:
        at = common.row_offsets(row, inner, residual_outer, residual_inner)
        added = residual + at[:, None] + col[None, :]
    acc = common.add_residual(
        acc, added, gamma, keep, row, col, row_mask, col >= 0, rows_per_sample
    )
    stored = acc.to(out.dtype)
    out.store([m0, chunk * CHUNK], stored)
    if row_stats_out is not None:
        statistics.store(row_stats_out, stored.to(tl.float32), m0, chunk * CHUNK, rows, 3 * CHUNK)


@triton.jit
def _gelu_mlp_kernel(
    x,
    w1,
    b1,
    w2,
    b2,
    residual,
    gamma,
    keep,
    row_stats,
    norm_weight,
    norm_bias,
    eps,
    out,
    row_stats_out,
    rows,
    hidden,
    inner,
    residual_outer,
    residual_inner,
    rows_per_sample,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # Chunks that a loop carries are kept in shared memory, normalised, as the products' operand.
    # Otherwise they stay in registers, are converted for every product, and spill 216 bytes.
    x0, x1, x2 = statistics.chunks(
        x,
        tl.program_id(0) * BLOCK_M,
        row_stats,
        norm_weight,
        norm_bias,
        rows,
        eps,
        w1.dtype,
        CHUNK,
        BLOCK_M,
        PARTS,
    )
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        m0 = tile * BLOCK_M
        acc0 = tl.zeros((BLOCK_M, CHUNK), tl.float32)
        acc1 = tl.zeros((BLOCK_M, CHUNK), tl.float32)
        acc2 = tl.zeros((BLOCK_M, CHUNK), tl.float32)
        for h0 in tl.range(0, hidden, BLOCK_H):
            # Copies that are loaded beside one another are awaited together.
            in0, in1, in2 = w1.load([h0, 0]), w1.load([h0, CHUNK]), w1.load([h0, 2 * CHUNK])
            h = tl.dot(x0, in0.T)
            h = tl.dot(x1, in1.T, h)
            h = tl.dot(x2, in2.T, h)
            if b1 is not None:
                at = h0 + tl.arange(0, BLOCK_H)
                h += tl.load(b1 + at, mask=at < hidden, other=0.0).to(tl.float32)[None, :]
            # Channels past the last are act(0) = 0, and meet zeros of w2.
            p = common.activate(w2, h, ACTIVATION, True).to(w2.dtype)
            out0, out1, out2 = w2.load([0, h0]), w2.load([CHUNK, h0]), w2.load([2 * CHUNK, h0])
            acc0 = tl.dot(p, out0.T, acc0)
            acc1 = tl.dot(p, out1.T, acc1)
            acc2 = tl.dot(p, out2.T, acc2)
        accs = (acc0, acc1, acc2)
        for chunk in tl.static_range(3):
            _finish(
                accs[chunk],
                chunk,
                b2,
                residual,
                gamma,
                keep,
                out,
                row_stats_out,
                m0,
                rows,
                inner,
                residual_outer,
                residual_inner,
                rows_per_sample,
                CHUNK,
                BLOCK_M,
            )
        x0, x1, x2 = statistics.chunks(
            x,
            m0 + tl.num_programs(0) * BLOCK_M,
            row_stats,
            norm_weight,
            norm_bias,
            rows,
            eps,
            w1.dtype,
            CHUNK,
            BLOCK_M,
            PARTS,
        )
