"""Tiles of the packed qkv projection and of tensors beside it, for forward and backward alike."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common


def source(tensor: Tensor, block: int, head_dim: int, tma: bool) -> object:
    """What `load` reads [block, head_dim] tiles of a [B, N, channels] tensor from."""
    return common.descriptor(tensor, 1, block, head_dim) if tma else tensor


@triton.jit
def load(
    source,
    batch,
    token,
    channel,
    tokens,
    stride_b,
    stride_n,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK, BLOCK_D] of one sample from a token and a channel on.

    Zero past the last token and past HEAD_DIM channels. A descriptor would read the next head
    there, so with TMA BLOCK_D is HEAD_DIM (`attention_tiles.attention` sees to it).
    """
    if TMA:
        tile = source.load([batch, token, channel]).reshape(BLOCK, BLOCK_D)
    else:
        rows = token + tl.arange(0, BLOCK)
        cols = tl.arange(0, BLOCK_D)
        at = batch.to(tl.int64) * stride_b + rows.to(tl.int64)[:, None] * stride_n
        mask = (rows < tokens)[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (cols < HEAD_DIM)[None, :]
        tile = tl.load(source + at + (channel + cols)[None, :], mask=mask, other=0.0)
    return tile


def rope_arguments(
    rope: tuple[Tensor, Tensor, int, bool] | None,
) -> dict[str, object]:
    """What the kernels take for rotary positions: (sin, cos, prefix, interleaved), or for none.

    The tables are [N - prefix, d] or [H, N - prefix, d], of the same strides.
    """
    if rope is None:
        return dict.fromkeys(("sin", "cos", "rope_h", "rope_n", "prefix", "INTERLEAVED"))
    sin, cos, prefix, interleaved = rope
    sin, cos = common.last_contiguous(sin), common.last_contiguous(cos)
    if sin.stride() != cos.stride():
        sin, cos = sin.contiguous(), cos.contiguous()
    return {
        "sin": sin,
        "cos": cos,
        "rope_h": sin.stride(0) if sin.dim() == 3 else 0,
        "rope_n": sin.stride(-2),
        "prefix": prefix,
        "INTERLEAVED": int(interleaved),
    }


@triton.jit
def _partner(cols, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The other channel of each one's pair, and whether a channel is its pair's first."""
    if INTERLEAVED:
        first = cols % 2 == 0
        other = tl.where(first, cols + 1, cols - 1)
    else:
        first = cols < HEAD_DIM // 2
        other = tl.where(first, cols + HEAD_DIM // 2, cols - HEAD_DIM // 2)
    return other, first


@triton.jit
def _tables(sin, cos, head, token, tokens, rope_h, rope_n, prefix, BLOCK: tl.constexpr,
            HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """sin and cos [BLOCK, BLOCK_D] of a head from a token on, in fp32, and which rows turn."""
    rows = token + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    turns = (rows >= prefix) & (rows < tokens)
    at = head.to(tl.int64) * rope_h + (rows - prefix).to(tl.int64)[:, None] * rope_n
    mask = turns[:, None] & (cols < HEAD_DIM)[None, :]
    sines = tl.load(sin + at + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    cosines = tl.load(cos + at + cols[None, :], mask=mask, other=1.0).to(tl.float32)
    return sines, cosines, turns[:, None]


@triton.jit
def turned(tile, source, batch, head, token, channel, tokens, stride_b, stride_n, sin, cos, rope_h,
           rope_n, prefix, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
           BLOCK_D: tl.constexpr):  # fmt: skip
    """What `load` read from there by pointers, with rotary positions where there are any.

    The other channel of every pair is read from the source again, where it is in L1 by now.
    """
    if sin is not None:
        rows = token + tl.arange(0, BLOCK)
        cols = tl.arange(0, BLOCK_D)
        other, first = _partner(cols, HEAD_DIM, INTERLEAVED)
        at = batch.to(tl.int64) * stride_b + rows.to(tl.int64)[:, None] * stride_n
        mask = (rows < tokens)[:, None] & (cols < HEAD_DIM)[None, :]
        pair = tl.load(source + at + (channel + other)[None, :], mask=mask, other=0.0)
        pair = tl.where(first[None, :], -pair.to(tl.float32), pair.to(tl.float32))
        sines, cosines, turns = _tables(
            sin, cos, head, token, tokens, rope_h, rope_n, prefix, BLOCK, HEAD_DIM, BLOCK_D
        )
        y = tile.to(tl.float32) * cosines + pair * sines
        tile = tl.where(turns, y.to(tile.dtype), tile)
    return tile


@triton.jit
def turned_back(gradient, head, token, tokens, sin, cos, rope_h, rope_n, prefix,
                INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """The gradient of what `turned` read from that of what it gave, [BLOCK, BLOCK_D] in fp32."""
    if sin is not None:
        sines, cosines, turns = _tables(
            sin, cos, head, token, tokens, rope_h, rope_n, prefix, gradient.shape[0], HEAD_DIM,
            gradient.shape[1],
        )  # fmt: skip
        other, first = _partner(tl.arange(0, gradient.shape[1]), HEAD_DIM, INTERLEAVED)
        # A column past the head's channels may take any; they are not stored.
        places = tl.maximum(0, tl.minimum(other, gradient.shape[1] - 1))
        at = tl.broadcast_to(places[None, :], gradient.shape)
        pair = tl.gather(gradient * sines, at, 1)
        y = gradient * cosines + tl.where(first[None, :], pair, -pair)
        gradient = tl.where(turns, y, gradient)
    return gradient


@triton.jit
def key_bias(bias, batch, token, tokens, bias_b, bias_n, BLOCK: tl.constexpr):
    """What is added to the scores of BLOCK keys: -inf past the last token."""
    keys = token + tl.arange(0, BLOCK)
    if bias is None:
        values = tl.where(keys < tokens, 0.0, float("-inf"))
    else:
        at = bias + batch.to(tl.int64) * bias_b + keys.to(tl.int64) * bias_n
        values = tl.load(at, mask=keys < tokens, other=float("-inf")).to(tl.float32)
        # fp32's smallest number times log2(e) would be -inf, which hides a key altogether.
        values = tl.where(values == float("-inf"), values, tl.maximum(values, -2.35e38))
    return values


@triton.jit
def store(
    out,
    y,
    batch,
    token,
    channel,
    tokens,
    channels,
    HEAD_DIM: tl.constexpr,
):
    """Write y at a token and a channel of the contiguous [B, tokens, channels] tensor `out`."""
    rows = token + tl.arange(0, y.shape[0])
    cols = tl.arange(0, y.shape[1])
    row = batch.to(tl.int64) * tokens + rows
    mask = (rows < tokens)[:, None]
    if y.shape[1] != HEAD_DIM:
        mask = mask & (cols < HEAD_DIM)[None, :]
    at = row[:, None] * channels + (channel + cols)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
