"""Self-attention on the packed qkv projection, read where the projection wrote it.

Two kernels. On Hopper and later up to 256 keys (197 and 198 tokens pad to that), K and V of one
head stay on chip, every score of a query is there at once, and softmax needs no rescaling.
Elsewhere softmax is online (arXiv 1805.02867; the tiling of arXiv 2205.14135). Scores, softmax
and sums are fp32; the probabilities are rounded to qkv's dtype for the second product, as
PyTorch's fused kernels do. A query with no key left (all scores -inf) gives zeros, as PyTorch's.

With rotary positions q and k are turned as they are loaded, by pointers: a descriptor cannot read
the other channel of a pair, so softmax is online there.

For training both also save the log of each query's sum of exponentials. They then keep scores in
natural units: where one key takes everything, lse is its score to the bit, and the backward's
exp(score - lse) is 1. Through units of log2, which inference uses to spare a product a score,
lse would come back an ulp or two off, and at a score of 100 that is an error of 1e-5 in p.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.attention import triton_lean, triton_persistent
from deit.kernels.attention import triton_qkv as qkv_tiles
from deit.kernels.device import common, launching

_LOG2_E = tl.constexpr(1.4426950408889634)


@launching.kept
def attention(
    qkv: Tensor, *rest: Any, config: attention_tiles.AttentionConfig | None = None
) -> Tensor:
    """`deit.kernels.attention` on Triton.

    qkv is copied only where its last axis is not contiguous. Its other strides are used as
    they are.
    """
    return common.written(plan(qkv, *rest, config=config), qkv)[0]


@launching.kept
def attention_fwd(
    qkv: Tensor, *rest: Any, config: attention_tiles.AttentionConfig | None = None
) -> tuple[Tensor, Tensor]:
    """(`attention`, lse): lse [B, H, N] in fp32 is the natural log of each query's sum of
    exp(score), -inf for a query with no key left."""
    out, lse = common.written(plan(qkv, *rest, save_lse=True, config=config), qkv)
    assert lse is not None
    return out, lse


@launching.kept
def rotary_attention(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    *rope: Any,
    config: attention_tiles.AttentionConfig | None = None,
) -> Tensor:
    """`deit.kernels.rotary_attention` on Triton; copies the tables where their last axes are not
    contiguous or their other strides differ."""
    planned = plan(qkv, num_heads, scale, None, rope=rope, config=config)
    return common.written(planned, qkv)[0]


@launching.kept
def rotary_attention_fwd(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    *rope: Any,
    config: attention_tiles.AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(`rotary_attention`, lse), as `attention_fwd`."""
    planned = plan(qkv, num_heads, scale, None, rope=rope, save_lse=True, config=config)
    out, lse = common.written(planned, qkv)
    assert lse is not None
    return out, lse


def plan(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    key_bias: Tensor | None,
    *,
    rope: Any = None,
    save_lse: bool = False,
    config: attention_tiles.AttentionConfig | None = None,
) -> tuple[tuple[Tensor, Tensor | None], common.Launch | None]:
    """(out, lse or None), unwritten, and the launch that writes them; None for an empty output.

    rope: (sin, cos, prefix, interleaved), or None.

    A lean configuration is run as such in inference, without a key bias or rotary positions, with
    a positive scale: its maximum is of the scores before it.
    """
    batch, tokens, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    out = torch.empty((batch, tokens, channels // 3), dtype=qkv.dtype, device=qkv.device)
    lse = None
    if save_lse:
        lse = torch.empty((batch, num_heads, tokens), dtype=torch.float32, device=qkv.device)
    if out.numel() == 0:
        return (out, lse), None
    qkv = common.last_contiguous(qkv)
    known = common.architecture(qkv), qkv.dtype, head_dim
    if config is None and rope is None:
        config = attention_tiles.attention(*known, tokens, common.describable(qkv))
    config = config or attention_tiles.rotary_attention(*known)
    lean = config.lean and rope is None and key_bias is None and not save_lse and scale > 0
    if lean and not config.online:
        scale *= _LOG2_E.value
        return (out, lse), triton_persistent.plan(qkv, out, num_heads, scale, config)
    query_blocks = triton.cdiv(tokens, config.block_m)
    arguments = {
        "q_source": qkv_tiles.source(qkv, config.block_m, head_dim, config.tma),
        "kv_source": qkv_tiles.source(qkv, config.block_n, head_dim, config.tma),
        "key_bias": key_bias,
        "out": out,
        "lse": lse,
        "tokens": tokens,
        "num_heads": num_heads,
        "stride_b": qkv.stride(0),
        "stride_n": qkv.stride(1),
        "bias_b": 0 if key_bias is None else key_bias.stride(0),
        "bias_n": 0 if key_bias is None else key_bias.stride(1),
        "scale": scale if save_lse else scale * _LOG2_E.value,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TMA": config.tma,
        "PRECISION": common.precision(qkv.dtype),
    }
    if lean:
        for name in ("key_bias", "lse", "bias_b", "bias_n"):
            del arguments[name]
        if config.pointed:
            arguments["q_source"] = qkv
        arguments["Q_TMA"] = config.tma and not config.pointed
        kernel, programs = triton_lean.lean_kernel, query_blocks
    elif config.online:
        arguments |= qkv_tiles.rope_arguments(rope)
        kernel, programs = _online_kernel, query_blocks
    else:
        # A program takes every query of its head, unless that leaves multiprocessors idle.
        fills = batch * num_heads >= 2 * common.multiprocessors(qkv)
        blocks = query_blocks if fills else 1
        arguments["span"] = blocks * config.block_m
        kernel, programs = _one_block_kernel, triton.cdiv(query_blocks, blocks)
    arguments["programs"] = programs
    grid = (batch * num_heads * programs,)
    launch = common.Launch(kernel, grid, arguments, config.num_warps, config.num_stages)
    return (out, lse), launch


@triton.jit
def _finish(y, total, out, batch, head, token, tokens, num_heads, HEAD_DIM: tl.constexpr):
    """Divide by the sum of exponentials and write the queries from `token` on."""
    y = y / tl.where(total == 0.0, 1.0, total)[:, None]
    qkv_tiles.store(out, y, batch, token, head * HEAD_DIM, tokens, num_heads * HEAD_DIM, HEAD_DIM)


@triton.jit
def _store_lse(lse, maximum, total, batch, head, token, tokens, num_heads):
    """Write the queries' log of the sum of exponentials, where it is wanted."""
    if lse is not None:
        rows = token + tl.arange(0, total.shape[0])
        at = (batch.to(tl.int64) * num_heads + head) * tokens + rows
        tl.store(lse + at, maximum + tl.log(total), mask=rows < tokens)


@triton.jit
def _finite_maximum(maximum):
    """0 for a maximum of -inf: -inf - 0 gives the probability 0, -inf - -inf would give NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _exponential(x, lse):
    """exp(x) in natural units (where lse is saved), 2**x in units of log2."""
    return tl.exp(x) if lse is not None else tl.math.exp2(x)


@triton.jit
def _scores(q, k, bias, scale, lse, PRECISION: tl.constexpr):
    """q kT * scale + bias, in the units of `_exponential`; `scale` has log2(e) in it already."""
    if lse is None:
        bias = bias * _LOG2_E
    return tl.dot(q, k.T, input_precision=PRECISION) * scale + bias[None, :]


@triton.jit
def _one_block_kernel(
    q_source,
    kv_source,
    key_bias,
    out,
    lse,
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
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head = tl.program_id(0) // programs
    batch, head = batch_head // num_heads, batch_head % num_heads
    width, channel = num_heads * HEAD_DIM, head * HEAD_DIM
    k = qkv_tiles.load(
        kv_source,
        batch,
        0,
        width + channel,
        tokens,
        stride_b,
        stride_n,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
        TMA,
    )
    v = qkv_tiles.load(
        kv_source,
        batch,
        0,
        2 * width + channel,
        tokens,
        stride_b,
        stride_n,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
        TMA,
    )
    bias = qkv_tiles.key_bias(key_bias, batch, 0, tokens, bias_b, bias_n, BLOCK_N)
    first = (tl.program_id(0) % programs) * span
    for m0 in tl.range(first, tl.minimum(first + span, tokens), BLOCK_M):
        q = qkv_tiles.load(
            q_source,
            batch,
            m0,
            channel,
            tokens,
            stride_b,
            stride_n,
            BLOCK_M,
            HEAD_DIM,
            BLOCK_D,
            TMA,
        )
        scores = _scores(q, k, bias, scale, lse, PRECISION)
        maximum = _finite_maximum(tl.max(scores, 1))
        p = _exponential(scores - maximum[:, None], lse)
        total = tl.sum(p, 1)
        _store_lse(lse, maximum, total, batch, head, m0, tokens, num_heads)
        y = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        _finish(y, total, out, batch, head, m0, tokens, num_heads, HEAD_DIM)


@triton.jit
def _online_kernel(
    q_source,
    kv_source,
    key_bias,
    out,
    lse,
    tokens,
    num_heads,
    stride_b,
    stride_n,
    bias_b,
    bias_n,
    scale,
    sin,
    cos,
    rope_h,
    rope_n,
    prefix,
    programs,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    batch_head = tl.program_id(0) // programs
    batch, head = batch_head // num_heads, batch_head % num_heads
    width, channel = num_heads * HEAD_DIM, head * HEAD_DIM
    m0 = (tl.program_id(0) % programs) * BLOCK_M
    q = qkv_tiles.load(
        q_source, batch, m0, channel, tokens, stride_b, stride_n, BLOCK_M, HEAD_DIM, BLOCK_D, TMA
    )
    q = qkv_tiles.turned(
        q, q_source, batch, head, m0, channel, tokens, stride_b, stride_n, sin, cos, rope_h, rope_n,
        prefix, INTERLEAVED, BLOCK_M, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if sin is not None and lse is None:
        # A way around the loop would set y, and ptxas then await every wgmma (triton 3.6, 3.8).
        tl.assume(tokens > 0)
    for n0 in tl.range(0, tokens, BLOCK_N):
        k = qkv_tiles.load(
            kv_source,
            batch,
            n0,
            width + channel,
            tokens,
            stride_b,
            stride_n,
            BLOCK_N,
            HEAD_DIM,
            BLOCK_D,
            TMA,
        )
        k = qkv_tiles.turned(
            k, kv_source, batch, head, n0, width + channel, tokens, stride_b, stride_n, sin, cos,
            rope_h, rope_n, prefix, INTERLEAVED, BLOCK_N, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        bias = qkv_tiles.key_bias(key_bias, batch, n0, tokens, bias_b, bias_n, BLOCK_N)
        scores = _scores(q, k, bias, scale, lse, PRECISION)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        reference = _finite_maximum(new_maximum)
        p = _exponential(scores - reference[:, None], lse)
        shrink = _exponential(maximum - reference, lse)
        total = total * shrink + tl.sum(p, 1)
        v = qkv_tiles.load(
            kv_source,
            batch,
            n0,
            2 * width + channel,
            tokens,
            stride_b,
            stride_n,
            BLOCK_N,
            HEAD_DIM,
            BLOCK_D,
            TMA,
        )
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION)
        maximum = new_maximum
    _store_lse(lse, _finite_maximum(maximum), total, batch, head, m0, tokens, num_heads)
    _finish(y, total, out, batch, head, m0, tokens, num_heads, HEAD_DIM)
