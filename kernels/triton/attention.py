"""Self-attention on the packed qkv projection, read where the projection wrote it.

Two kernels. On Hopper and later up to 256 keys (197 and 198 tokens pad to that), K and V of one
head stay on chip, every score of a query is there at once, and softmax needs no rescaling.
Elsewhere softmax is online (arXiv 1805.02867; the tiling of arXiv 2205.14135). Scores, softmax
and sums are fp32; the probabilities are rounded to qkv's dtype for the second product, as
PyTorch's fused kernels do. A query with no key left (all scores -inf) gives zeros, as PyTorch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.triton import common, configs

_LOG2_E = tl.constexpr(1.4426950408889634)


def attention(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    key_bias: Tensor | None,
    *,
    config: configs.AttentionConfig | None = None,
) -> Tensor:
    """`deit.kernels.attention` on Triton.

    Copied is only a qkv whose last axis is not contiguous; its other strides are used as
    they are.
    """
    out, launch = plan(qkv, num_heads, scale, key_bias, config=config)
    if launch is not None:
        launch.run(qkv)
    return out


def plan(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    key_bias: Tensor | None,
    *,
    config: configs.AttentionConfig | None = None,
) -> tuple[Tensor, common.Launch | None]:
    """The output, unwritten, and the launch that writes it; None for an empty output."""
    batch, tokens, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    out = torch.empty((batch, tokens, channels // 3), dtype=qkv.dtype, device=qkv.device)
    if out.numel() == 0:
        return out, None
    qkv = common.last_contiguous(qkv)
    config = config or configs.attention(
        common.architecture(qkv), qkv.dtype, head_dim, tokens, common.describable(qkv)
    )
    query_blocks = triton.cdiv(tokens, config.block_m)
    arguments = {
        "q_source": _source(qkv, config.block_m, head_dim, config.tma),
        "kv_source": _source(qkv, config.block_n, head_dim, config.tma),
        "key_bias": key_bias,
        "out": out,
        "tokens": tokens,
        "num_heads": num_heads,
        "stride_b": qkv.stride(0),
        "stride_n": qkv.stride(1),
        "bias_b": 0 if key_bias is None else key_bias.stride(0),
        "bias_n": 0 if key_bias is None else key_bias.stride(1),
        "scale": scale * _LOG2_E.value,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TMA": config.tma,
        "PRECISION": common.precision(qkv.dtype),
    }
    if config.online:
        kernel, programs = _online_kernel, query_blocks
    else:
        # A program takes every query of its head, unless that leaves multiprocessors idle.
        fills = batch * num_heads >= 2 * common.multiprocessors(qkv)
        blocks = query_blocks if fills else 1
        arguments["span"] = blocks * config.block_m
        kernel, programs = _one_block_kernel, triton.cdiv(query_blocks, blocks)
    arguments["programs"] = programs
    grid = (batch * num_heads * programs,)
    return out, common.Launch(kernel, grid, arguments, config.num_warps, config.num_stages)


def _source(qkv: Tensor, block: int, head_dim: int, tma: bool) -> object:
    return common.descriptor(qkv, 1, block, head_dim) if tma else qkv


@triton.jit
def _load(
    source,
    batch,
    token,
    channel,
    tokens,
    stride_b,
    stride_n,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK, HEAD_DIM] of one sample from a token and a channel on; zero past the last token."""
    if TMA:
        tile = source.load([batch, token, channel]).reshape(BLOCK, HEAD_DIM)
    else:
        rows = token + tl.arange(0, BLOCK)
        cols = channel + tl.arange(0, HEAD_DIM)
        at = batch.to(tl.int64) * stride_b + rows.to(tl.int64)[:, None] * stride_n + cols[None, :]
        tile = tl.load(source + at, mask=(rows < tokens)[:, None], other=0.0)
    return tile


@triton.jit
def _key_bias(key_bias, batch, token, tokens, bias_b, bias_n, BLOCK: tl.constexpr):
    """What is added to the scores of BLOCK keys, in units of log2: -inf past the last token."""
    keys = token + tl.arange(0, BLOCK)
    if key_bias is None:
        values = tl.where(keys < tokens, 0.0, float("-inf"))
    else:
        at = key_bias + batch.to(tl.int64) * bias_b + keys.to(tl.int64) * bias_n
        values = tl.load(at, mask=keys < tokens, other=float("-inf")).to(tl.float32) * _LOG2_E
    return values


@triton.jit
def _store(
    out, y, batch, head, token, tokens, num_heads, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    rows = token + tl.arange(0, BLOCK)
    cols = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    row = batch.to(tl.int64) * tokens + rows
    at = row[:, None] * (num_heads * HEAD_DIM) + cols[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(rows < tokens)[:, None])


@triton.jit
def _finite_maximum(maximum):
    """0 for a maximum of -inf: -inf - 0 gives the probability 0, -inf - -inf would give NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _one_block_kernel(
    q_source,
    kv_source,
    key_bias,
    out,
    tokens,
    num_heads,
    stride_b,
    stride_n,
    bias_b,
    bias_n,
    scale,
    span,
    programs,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head = tl.program_id(0) // programs
    batch, head = batch_head // num_heads, batch_head % num_heads
    width, channel = num_heads * HEAD_DIM, head * HEAD_DIM
    k = _load(
        kv_source, batch, 0, width + channel, tokens, stride_b, stride_n, BLOCK_N, HEAD_DIM, TMA
    )
    v = _load(
        kv_source, batch, 0, 2 * width + channel, tokens, stride_b, stride_n, BLOCK_N, HEAD_DIM, TMA
    )
    bias = _key_bias(key_bias, batch, 0, tokens, bias_b, bias_n, BLOCK_N)
    first = (tl.program_id(0) % programs) * span
    for m0 in tl.range(first, tl.minimum(first + span, tokens), BLOCK_M):
        q = _load(q_source, batch, m0, channel, tokens, stride_b, stride_n, BLOCK_M, HEAD_DIM, TMA)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale + bias[None, :]
        p = tl.math.exp2(scores - _finite_maximum(tl.max(scores, 1))[:, None])
        total = tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        y = y / tl.where(total == 0.0, 1.0, total)[:, None]
        _store(out, y, batch, head, m0, tokens, num_heads, BLOCK_M, HEAD_DIM)


@triton.jit
def _online_kernel(
    q_source,
    kv_source,
    key_bias,
    out,
    tokens,
    num_heads,
    stride_b,
    stride_n,
    bias_b,
    bias_n,
    scale,
    programs,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head = tl.program_id(0) // programs
    batch, head = batch_head // num_heads, batch_head % num_heads
    width, channel = num_heads * HEAD_DIM, head * HEAD_DIM
    m0 = (tl.program_id(0) % programs) * BLOCK_M
    q = _load(q_source, batch, m0, channel, tokens, stride_b, stride_n, BLOCK_M, HEAD_DIM, TMA)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for n0 in tl.range(0, tokens, BLOCK_N):
        k = _load(
            kv_source,
            batch,
            n0,
            width + channel,
            tokens,
            stride_b,
            stride_n,
            BLOCK_N,
            HEAD_DIM,
            TMA,
        )
        bias = _key_bias(key_bias, batch, n0, tokens, bias_b, bias_n, BLOCK_N)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale + bias[None, :]
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        reference = _finite_maximum(new_maximum)
        p = tl.math.exp2(scores - reference[:, None])
        shrink = tl.math.exp2(maximum - reference)
        total = total * shrink + tl.sum(p, 1)
        v = _load(
            kv_source,
            batch,
            n0,
            2 * width + channel,
            tokens,
            stride_b,
            stride_n,
            BLOCK_N,
            HEAD_DIM,
            TMA,
        )
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION)
        maximum = new_maximum
    y = y / tl.where(total == 0.0, 1.0, total)[:, None]
    _store(out, y, batch, head, m0, tokens, num_heads, BLOCK_M, HEAD_DIM)
