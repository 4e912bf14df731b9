"""The gradient of self-attention on the packed qkv projection, written packed.

With p = exp(q kT * scale + key_bias - lse), dp = dout vT and delta = rowsum(dout * out)
(arXiv 2205.14135, appendix B.4):

    dv = pT dout        ds = p * (dp - delta)        dq = ds k * scale        dk = dsT q * scale

Nothing of size N x N is stored: p is computed again from q, k and lse. Two ways, both without
atomics, so that every sum has one order and results repeat to the bit:

- One program a head (Hopper, up to 256 tokens of 64 channels, which is DeiT at 224): q and dout
  of the whole head and the sum of dq stay on chip, keys pass by in blocks, each leaving its dk
  and dv behind. Five products, and every input is read once; 197 tokens take up to 243
  registers a thread and 123 KB, so one block of 8 warps a multiprocessor.
- Elsewhere a program owns a block of keys (dk, dv) while queries pass, or a block of queries
  (dq) while keys pass: seven products, since p and dp are computed for either. The programs of a
  head are neighbours in the grid and share its q, k, v and dout in L2. 164 registers and 50 KB on
  Hopper: three blocks of 4 warps a multiprocessor.

Scores, softmax and sums are fp32; p and ds are rounded to qkv's dtype as operands of the next
product, as PyTorch's fused kernels do. A query with no key left (lse = -inf) has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.attention import triton_qkv as qkv_tiles
from deit.kernels.device import common, launching

_DELTA_ROWS = 16  # 32 rows of 128 fp32 channels spill 8 bytes on Hopper


@launching.kept
def attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    *rest: Any,
    config: attention_tiles.AttentionBwdConfig | None = None,
) -> Tensor:
    """dqkv [B, N, 3 * D] in qkv's dtype, contiguous, from `attention_fwd`'s inputs and outputs.

    dout may have any strides; it is copied where its last axis is not contiguous (the expanded
    gradient of a sum) or, with tensor copies, where no descriptor can be made of it.
    """
    return common.written(plan(dout, qkv, *rest, config=config), qkv)


@launching.kept
def rotary_attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    *rope: Any,
    config: attention_tiles.AttentionBwdConfig | None = None,
) -> Tensor:
    """`attention_bwd`, of `rotary_attention_fwd`; the tables have no gradient."""
    planned = plan(dout, qkv, out, lse, num_heads, scale, None, rope=rope, config=config)
    return common.written(planned, qkv)


def plan(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    key_bias: Tensor | None,
    *,
    rope: Any = None,
    config: attention_tiles.AttentionBwdConfig | None = None,
) -> tuple[Tensor, list[common.Launch]]:
    """dqkv, unwritten, and the launches that write it, in order; none for an empty one.

    rope: (sin, cos, prefix, interleaved), or None.
    """
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return dqkv, []
    head_dim = qkv.shape[-1] // (3 * num_heads)
    qkv, dout, out = common.last_contiguous(qkv), common.last_contiguous(dout), out.contiguous()
    known = common.architecture(qkv), qkv.dtype, head_dim
    if config is None and rope is None:
        config = attention_tiles.attention_bwd(*known, qkv.shape[1], common.describable(qkv))
    config = config or attention_tiles.rotary_attention_bwd(*known)
    if config.tma and not common.describable(dout):
        dout = dout.contiguous()
    arguments = _inputs(qkv, dout, key_bias, num_heads, scale, config) | {"dqkv": dqkv}
    lse = lse.contiguous()
    if config.whole_head:
        return dqkv, _plan_whole_head(arguments, dout, out, lse, config)
    return dqkv, _plan_split(arguments | qkv_tiles.rope_arguments(rope), dout, out, lse, config)


def _inputs(
    qkv: Tensor,
    dout: Tensor,
    key_bias: Tensor | None,
    num_heads: int,
    scale: float,
    config: attention_tiles.AttentionBwdConfig,
) -> dict[str, Any]:
    """What both kernels take; each source once for tiles that stay and once for those that pass."""
    head_dim = qkv.shape[-1] // (3 * num_heads)
    stay, passing = (
        [qkv_tiles.source(t, block, head_dim, config.tma) for t in (qkv, dout)]
        for block in (config.resident, config.passing)
    )
    return {
        "qkv_resident": stay[0],
        "qkv_passing": passing[0],
        "dout_resident": stay[1],
        "key_bias": key_bias,
        "tokens": qkv.shape[1],
        "num_heads": num_heads,
        "qkv_b": qkv.stride(0),
        "qkv_n": qkv.stride(1),
        "dout_b": dout.stride(0),
        "dout_n": dout.stride(1),
        "bias_b": 0 if key_bias is None else key_bias.stride(0),
        "bias_n": 0 if key_bias is None else key_bias.stride(1),
        "scale": scale,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "RESIDENT": config.resident,
        "PASSING": config.passing,
        "TMA": config.tma,
        "PRECISION": common.precision(qkv.dtype),
    }


def _plan_whole_head(
    arguments: dict[str, Any],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    config: attention_tiles.AttentionBwdConfig,
) -> list[common.Launch]:
    batch, heads, _ = lse.shape
    arguments = arguments | {"out": out, "lse": lse}
    grid = (batch * heads,)
    return [common.Launch(_whole_head_kernel, grid, arguments, config.num_warps, config.num_stages)]


def _plan_split(
    arguments: dict[str, Any],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    config: attention_tiles.AttentionBwdConfig,
) -> list[common.Launch]:
    batch, heads, tokens = lse.shape
    delta = torch.empty_like(lse)
    kept = ("tokens", "num_heads", "dout_b", "dout_n", "HEAD_DIM", "BLOCK_D")
    rows = {"dout": dout, "out": out, "delta": delta, "ROWS": _DELTA_ROWS}
    before = common.Launch(
        _delta_kernel,
        (batch * heads * triton.cdiv(tokens, _DELTA_ROWS),),
        {name: arguments[name] for name in kept} | rows,
        num_warps=4,
    )
    blocks = triton.cdiv(tokens, config.resident)
    dout_passing = qkv_tiles.source(dout, config.passing, arguments["HEAD_DIM"], config.tma)
    arguments = arguments | {
        "dout_passing": dout_passing, "lse": lse, "delta": delta, "blocks": blocks
    }  # fmt: skip
    grid = (batch * heads * 2 * blocks,)
    return [
        before,
        common.Launch(_split_kernel, grid, arguments, config.num_warps, config.num_stages),
    ]


@triton.jit
def _delta_kernel(
    dout, out, delta, tokens, num_heads, dout_b, dout_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [B, H, N]: the sum of dout * out over each head's channels."""
    blocks = tl.cdiv(tokens, ROWS)
    batch_head = tl.program_id(0) // blocks
    batch, head = batch_head // num_heads, batch_head % num_heads
    token, channel, width = tl.program_id(0) % blocks * ROWS, head * HEAD_DIM, num_heads * HEAD_DIM
    do = qkv_tiles.load(
        dout, batch, token, channel, tokens, dout_b, dout_n, ROWS, HEAD_DIM, BLOCK_D, False
    )
    o = qkv_tiles.load(
        out, batch, token, channel, tokens, tokens * width, width,
        ROWS, HEAD_DIM, BLOCK_D, False,
    )  # fmt: skip
    rows = token + tl.arange(0, ROWS)
    at = batch_head.to(tl.int64) * tokens + rows
    tl.store(delta + at, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=rows < tokens)


@triton.jit
def _load_lse(lse, batch_head, token, tokens, BLOCK: tl.constexpr):
    """What to take from the scores of BLOCK queries so that exp gives their probabilities.

    It is inf past the last token, which makes every probability 0, whatever key_bias holds. It is
    0 for a query with no key left: its scores are -inf, and -inf - -inf would be NaN.
    """
    rows = token + tl.arange(0, BLOCK)
    at = lse + batch_head.to(tl.int64) * tokens + rows
    values = tl.load(at, mask=rows < tokens, other=float("inf"))
    return tl.where(values == float("-inf"), 0.0, values)


@triton.jit
def _load_delta(delta, batch_head, token, tokens, BLOCK: tl.constexpr):
    rows = token + tl.arange(0, BLOCK)
    return tl.load(delta + batch_head.to(tl.int64) * tokens + rows, mask=rows < tokens, other=0.0)


@triton.jit
def _split_kernel(
    qkv_resident, qkv_passing, dout_resident, dout_passing, key_bias, lse, delta, dqkv,
    tokens, num_heads, qkv_b, qkv_n, dout_b, dout_n, bias_b, bias_n, scale, blocks,
    sin, cos, rope_h, rope_n, prefix,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, PASSING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The first `blocks` programs of a head take its keys, the others its queries."""
    batch_head = tl.program_id(0) // (2 * blocks)
    block = tl.program_id(0) % (2 * blocks)
    if block < blocks:
        _block(
            True, qkv_resident, qkv_resident, qkv_passing, dout_passing, key_bias, lse, delta,
            dqkv, batch_head, block * RESIDENT, tokens, num_heads, qkv_b, qkv_n, qkv_b, qkv_n,
            dout_b, dout_n, bias_b, bias_n, scale,
            sin, cos, rope_h, rope_n, prefix,
            HEAD_DIM, BLOCK_D, RESIDENT, PASSING, TMA, PRECISION, INTERLEAVED,
        )  # fmt: skip
    else:
        _block(
            False, qkv_resident, dout_resident, qkv_passing, qkv_passing, key_bias, lse, delta,
            dqkv, batch_head, (block - blocks) * RESIDENT, tokens, num_heads, qkv_b, qkv_n,
            dout_b, dout_n, qkv_b, qkv_n, bias_b, bias_n, scale,
            sin, cos, rope_h, rope_n, prefix,
            HEAD_DIM, BLOCK_D, RESIDENT, PASSING, TMA, PRECISION, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _block(
    KEYS: tl.constexpr, a_source, da_source, b_source, db_source, key_bias, lse, delta, dqkv,
    batch_head, a0, tokens, num_heads, qkv_b, qkv_n, da_b, da_n, db_b, db_n, bias_b, bias_n, scale,
    sin, cos, rope_h, rope_n, prefix,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, PASSING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """dk and dv of RESIDENT keys (KEYS), or dq of RESIDENT queries.

    One loop serves both. Let (a, da) be what stays and (b, db) what passes: they are (k, v) and
    (q, dout), or the other way round. Then scores are a bT, dp is da dbT, and the gradient of a is
    ds b. For keys this leaves scores, p and ds transposed, and dv is p db. Rotary positions turn a
    and b as they are loaded, and the gradient of a back.
    """
    batch, head = batch_head // num_heads, batch_head % num_heads
    width, channel = num_heads * HEAD_DIM, head * HEAD_DIM
    # Where each of the four is among the channels; dout has no k and v before it.
    a_at = channel + (width if KEYS else 0)
    da_at = channel + (2 * width if KEYS else 0)
    b_at = channel + (0 if KEYS else width)
    db_at = channel + (0 if KEYS else 2 * width)
    a = qkv_tiles.load(
        a_source, batch, a0, a_at, tokens, qkv_b, qkv_n, RESIDENT, HEAD_DIM, BLOCK_D, TMA
    )
    a = qkv_tiles.turned(
        a, a_source, batch, head, a0, a_at, tokens, qkv_b, qkv_n, sin, cos, rope_h, rope_n, prefix,
        INTERLEAVED, RESIDENT, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    da = qkv_tiles.load(
        da_source, batch, a0, da_at, tokens, da_b, da_n, RESIDENT, HEAD_DIM, BLOCK_D, TMA
    )
    if KEYS:
        a_bias = qkv_tiles.key_bias(key_bias, batch, a0, tokens, bias_b, bias_n, RESIDENT)[:, None]
    else:
        a_lse = _load_lse(lse, batch_head, a0, tokens, RESIDENT)[:, None]
        a_delta = _load_delta(delta, batch_head, a0, tokens, RESIDENT)[:, None]
    gradient = tl.zeros((RESIDENT, BLOCK_D), tl.float32)
    dv = tl.zeros((RESIDENT, BLOCK_D), tl.float32)
    if TMA and HEAD_DIM == 32:
        # A way around the loop would set the sums, and ptxas then await every wgmma (triton 3.8).
        # Of 64 channels it does not, and this would take 13 registers and one block of three. By
        # pointers it would spill 8 bytes on sm_80 and 16 on sm_120.
        tl.assume(tokens > 0)
    for b0 in tl.range(0, tokens, PASSING):
        b = qkv_tiles.load(
            b_source, batch, b0, b_at, tokens, qkv_b, qkv_n, PASSING, HEAD_DIM, BLOCK_D, TMA
        )
        b = qkv_tiles.turned(
            b, b_source, batch, head, b0, b_at, tokens, qkv_b, qkv_n, sin, cos, rope_h, rope_n,
            prefix, INTERLEAVED, PASSING, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        db = qkv_tiles.load(
            db_source, batch, b0, db_at, tokens, db_b, db_n, PASSING, HEAD_DIM, BLOCK_D, TMA
        )
        scores = tl.dot(a, b.T, input_precision=PRECISION) * scale
        dp = tl.dot(da, db.T, input_precision=PRECISION)
        if KEYS:
            row_lse = _load_lse(lse, batch_head, b0, tokens, PASSING)[None, :]
            row_delta = _load_delta(delta, batch_head, b0, tokens, PASSING)[None, :]
            p = tl.exp(scores + a_bias - row_lse)
            ds = p * (dp - row_delta)
            dv = tl.dot(p.to(db.dtype), db, dv, input_precision=PRECISION)
        else:
            bias = qkv_tiles.key_bias(key_bias, batch, b0, tokens, bias_b, bias_n, PASSING)[None, :]
            ds = tl.exp(scores + bias - a_lse) * (dp - a_delta)
        gradient = tl.dot(ds.to(b.dtype), b, gradient, input_precision=PRECISION)
    gradient = qkv_tiles.turned_back(
        gradient * scale, head, a0, tokens, sin, cos, rope_h, rope_n, prefix, INTERLEAVED, HEAD_DIM
    )
    qkv_tiles.store(dqkv, gradient, batch, a0, a_at, tokens, 3 * width, HEAD_DIM)
    if KEYS:
        qkv_tiles.store(dqkv, dv, batch, a0, da_at, tokens, 3 * width, HEAD_DIM)


@triton.jit
def _whole_head_kernel(
    qkv_resident, qkv_passing, dout_resident, out, key_bias, lse, dqkv,
    tokens, num_heads, qkv_b, qkv_n, dout_b, dout_n, bias_b, bias_n, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, PASSING: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    width, channel = num_heads * HEAD_DIM, head * HEAD_DIM
    # Loads to registers are awaited where they are used, tensor copies where they stand.
    o = qkv_tiles.load(
        out, batch, 0, channel, tokens, tokens * width, width,
        RESIDENT, HEAD_DIM, BLOCK_D, False,
    )  # fmt: skip
    row_lse = _load_lse(lse, tl.program_id(0), 0, tokens, RESIDENT)
    q = qkv_tiles.load(
        qkv_resident, batch, 0, channel, tokens, qkv_b, qkv_n, RESIDENT, HEAD_DIM, BLOCK_D, TMA
    )
    do = qkv_tiles.load(
        dout_resident, batch, 0, channel, tokens, dout_b, dout_n, RESIDENT, HEAD_DIM, BLOCK_D, TMA
    )
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    dq = tl.zeros((RESIDENT, BLOCK_D), tl.float32)
    for n0 in tl.range(0, tokens, PASSING):
        k = qkv_tiles.load(
            qkv_passing, batch, n0, width + channel, tokens, qkv_b, qkv_n,
            PASSING, HEAD_DIM, BLOCK_D, TMA,
        )  # fmt: skip
        v = qkv_tiles.load(
            qkv_passing, batch, n0, 2 * width + channel, tokens, qkv_b, qkv_n,
            PASSING, HEAD_DIM, BLOCK_D, TMA,
        )  # fmt: skip
        bias = qkv_tiles.key_bias(key_bias, batch, n0, tokens, bias_b, bias_n, PASSING)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale + bias[None, :]
        p = tl.exp(scores - row_lse[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        # Transposed, so that the 64 channels are the rows: wgmma takes no fewer than 64.
        dv = tl.dot(do.T, p.to(do.dtype), input_precision=PRECISION)
        dk = tl.dot(q.T, ds, input_precision=PRECISION)
        qkv_tiles.store(dqkv, dk.T * scale, batch, n0, width + channel, tokens, 3 * width, HEAD_DIM)
        qkv_tiles.store(dqkv, dv.T, batch, n0, 2 * width + channel, tokens, 3 * width, HEAD_DIM)
    qkv_tiles.store(dqkv, dq * scale, batch, 0, channel, tokens, 3 * width, HEAD_DIM)
