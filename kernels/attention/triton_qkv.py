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
