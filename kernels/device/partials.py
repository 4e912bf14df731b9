"""Sums of what the programs of a kernel left behind: the second half of a reduction over rows.

A first kernel keeps one partial sum a program and writes it once; this one adds them in a fixed
order. No float is added atomically, so a repeated call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common

_TILE = 1024  # partial sums a program holds: 8 a thread, 16 loads of 64 B or more in flight


def plan_sum(partials: Tensor, *outs: Tensor) -> common.Launch:
    """outs[i] = partials[i].sum(0), rounded once to its own dtype.

    partials: [slots, count, length], fp32, contiguous; outs: up to three tensors of `length`
    elements, contiguous, of the first slots. Reads and writes every element once.
    """
    _, count, length = partials.shape
    block_p = min(64, triton.next_power_of_2(count))
    block = _TILE // block_p
    first, second, third = (*outs, None, None)[:3]
    arguments = {
        "partials": partials,
        "first": first,
        "second": second,
        "third": third,
        "count": count,
        "slot": count * length,
        "length": length,
        "BLOCK_P": block_p,
        "BLOCK": block,
    }
    return common.Launch(_sum_kernel, (triton.cdiv(length, block),), arguments, num_warps=4)


@triton.jit
def _sum_slot(partials, out, cols, count, length, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for first in tl.range(0, count, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = p.to(tl.int64)[:, None] * length + cols[None, :]
        acc += tl.load(partials + at, mask=(p < count)[:, None] & (cols < length)[None, :], other=0)
    tl.store(out + cols, tl.sum(acc, 0).to(out.dtype.element_ty), mask=cols < length)


@triton.jit
def _sum_kernel(
    partials,
    first,
    second,
    third,
    count,
    length,
    slot,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _sum_slot(partials, first, cols, count, length, BLOCK_P, BLOCK)
    if second is not None:
        _sum_slot(partials + slot, second, cols, count, length, BLOCK_P, BLOCK)
    if third is not None:
        _sum_slot(partials + slot + slot, third, cols, count, length, BLOCK_P, BLOCK)
