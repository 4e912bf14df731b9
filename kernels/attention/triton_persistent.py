"""Attention in inference without a key bias, every score of a query at once, on Hopper and
sm_100.

Up to 256 keys the scores of 128 queries stay in registers, so softmax needs no rescaling. Keys are
padded to 16 and come in parts of powers of two: 197 are 128 + 64 + 16, where one block is 256.
Only the last part has a mask. So on Hopper 64 queries are 995 instructions a warp in 161 registers,
where `triton._online_kernel` takes 2,323. On sm_100 they are 11 % more than by
`triton._one_block_kernel`, which awaits its copies one by one.

A multiprocessor has one program, and that does one block of queries after another. All seven copies
of a block are issued together, two blocks ahead, and so is the store behind: none is awaited where
it stands. `deit tune` alone chooses it, and it was never timed.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.attention import triton_qkv as qkv_tiles
from deit.kernels.device import common


def plan(
    qkv: Tensor, out: Tensor, num_heads: int, scale: float, config: attention_tiles.AttentionConfig
) -> common.Launch:
    """The launch that writes `out`; `scale` has log2(e) in it and is positive."""
    batch, tokens, channels = out.shape
    head_dim = channels // num_heads
    keys = attention_tiles.padded_keys(tokens)
    blocks = triton.cdiv(tokens, config.block_m)
    arguments: dict[str, Any] = {
        "q_source": qkv_tiles.source(qkv, config.block_m, head_dim, True),
        **{
            f"keys_{size}": qkv_tiles.source(qkv, size, head_dim, True) if keys & size else None
            for size in (256, 128, 64, 32, 16)
        },
        "out": qkv_tiles.source(out, config.block_m, head_dim, True),
        "tokens": tokens,
        "num_heads": num_heads,
        "scale": scale,
        "blocks": blocks,
        "units": batch * num_heads * blocks,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "KEYS": keys,
    }
    grid = (min(batch * num_heads * blocks, common.multiprocessors(qkv)),)
    return common.Launch(persistent_kernel, grid, arguments, config.num_warps, config.num_stages)


@triton.jit
def persistent_kernel(
    q_source, keys_256, keys_128, keys_64, keys_32, keys_16, out, tokens, num_heads, scale, blocks,
    units, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A part of 256 >> i keys is there where KEYS has that bit, larger ones first."""
    sources = (keys_256, keys_128, keys_64, keys_32, keys_16)
    width = num_heads * HEAD_DIM
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0)):
        batch_head, m0 = unit // blocks, unit % blocks * BLOCK_M
        batch, channel = batch_head // num_heads, batch_head % num_heads * HEAD_DIM
        q = q_source.load([batch, m0, channel]).reshape(BLOCK_M, HEAD_DIM)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        scores = ()
        for i in tl.static_range(5):
            part = q  # stands for one that is not there
            if KEYS & (256 >> i):
                first = KEYS // (512 >> i) * (512 >> i)
                k = sources[i].load([batch, first, width + channel])
                part = tl.dot(q, k.reshape(256 >> i, HEAD_DIM).T)
                if first + (256 >> i) == KEYS:
                    inside = first + tl.arange(0, 256 >> i) < tokens
                    part = tl.where(inside[None, :], part, float("-inf"))
                largest = tl.maximum(largest, tl.max(part, 1))
            scores += (part,)  # type: ignore[assignment]
        # -inf - 0 gives the probability 0, -inf - -inf would give NaN.
        reference = tl.where(largest == float("-inf"), 0.0, largest) * scale
        total = tl.zeros((BLOCK_M,), tl.float32)
        y = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        for i in tl.static_range(5):
            if KEYS & (256 >> i):
                first = KEYS // (512 >> i) * (512 >> i)
                p = tl.math.exp2(scores[i] * scale - reference[:, None])
                total += tl.sum(p, 1)
                v = sources[i].load([batch, first, 2 * width + channel])
                v = v.reshape(256 >> i, HEAD_DIM)
                y = tl.dot(p.to(v.dtype), v, y)
        y = y * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        out.store([batch, m0, channel], y.to(out.dtype).reshape(1, BLOCK_M, HEAD_DIM))
