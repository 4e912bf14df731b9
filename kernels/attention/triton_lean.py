"""Attention in inference without a key bias by fewer instructions than `triton._online_kernel`.

By its count that kernel issues instructions for 127 of the 174 us that it takes on an H100: 2,323 a
warp for 64 queries of 197 keys, 253 of them in each turn of its loop by 32. Here

- keys that do not fill a block have a loop of their own, and the others no mask;
- the scale and the row's maximum are one multiply-add a score, which takes a positive scale;
- a row is multiplied by the reciprocal of its sum. Division is four instructions an element.

By 64 keys that is 1,789. Queries may come by pointers: a tensor copy outside of a loop is awaited
where it stands, and only then are the first keys' issued; loads to registers are not. `deit tune`
alone chooses it, and it was never timed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit.kernels.attention import triton_qkv as qkv_tiles


@triton.jit
def _pass(
    q, maximum, total, y, kv_source, batch, channel, width, first, last, tokens, stride_b, stride_n,
    scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys from `first` to `last`, BLOCK_N at a time; `maximum` is of q kT, without the scale."""
    for n0 in tl.range(first, last, BLOCK_N):
        k = qkv_tiles.load(
            kv_source, batch, n0, width + channel, tokens, stride_b, stride_n,
            BLOCK_N, HEAD_DIM, BLOCK_D, TMA,
        )  # fmt: skip
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            inside = n0 + tl.arange(0, BLOCK_N) < tokens
            scores = tl.where(inside[None, :], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        # -inf - 0 gives the probability 0, -inf - -inf would give NaN.
        reference = tl.where(larger == float("-inf"), 0.0, larger) * scale
        p = tl.math.exp2(scores * scale - reference[:, None])
        shrink = tl.math.exp2(maximum * scale - reference)
        total = total * shrink + tl.sum(p, 1)
        v = qkv_tiles.load(
            kv_source, batch, n0, 2 * width + channel, tokens, stride_b, stride_n,
            BLOCK_N, HEAD_DIM, BLOCK_D, TMA,
        )  # fmt: skip
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION)
        maximum = larger
    return maximum, total, y


@triton.jit
def lean_kernel(
    q_source, kv_source, out, tokens, num_heads, stride_b, stride_n, scale, programs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, Q_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`scale` has log2(e) in it and is positive. `programs`: of a head."""
    batch_head = tl.program_id(0) // programs
    batch, head = batch_head // num_heads, batch_head % num_heads
    width, channel = num_heads * HEAD_DIM, head * HEAD_DIM
    m0 = (tl.program_id(0) % programs) * BLOCK_M
    q = qkv_tiles.load(
        q_source, batch, m0, channel, tokens, stride_b, stride_n, BLOCK_M, HEAD_DIM, BLOCK_D, Q_TMA
    )
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = tokens // BLOCK_N * BLOCK_N
    maximum, total, y = _pass(
        q, maximum, total, y, kv_source, batch, channel, width, 0, whole, tokens,
        stride_b, stride_n, scale, HEAD_DIM, BLOCK_D, BLOCK_N, TMA, PRECISION, False,
    )  # fmt: skip
    maximum, total, y = _pass(
        q, maximum, total, y, kv_source, batch, channel, width, whole, tokens, tokens,
        stride_b, stride_n, scale, HEAD_DIM, BLOCK_D, BLOCK_N, TMA, PRECISION, True,
    )  # fmt: skip
    y = y * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    qkv_tiles.store(out, y, batch, m0, channel, tokens, width, HEAD_DIM)
