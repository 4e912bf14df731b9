"""Launches of attention that ship, and what of it `deit tune` measures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit.kernels.attention import TRITON_ROTARY_HEAD_DIMS, reference
from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.attention import triton as attention
from deit.kernels.attention import triton_bwd as attention_bwd
from deit.kernels.device import common
from deit.kernels.prove.launches import TOKENS, Kernel, Shipped, empty, first
from deit.kernels.prove.tuned import Terms, Tuned, gradients

HEAD_DIMS = (64, 32, 128, 80, 96)


def _attention(shipped: Shipped) -> common.Launch:
    dtype, heads = shipped.torch_dtype, 12
    tokens = 577 if "577" in shipped.variant else TOKENS
    # One spare element a token takes the strides off 16 bytes.
    spare = 1 if "unaligned" in shipped.variant else 0
    qkv = empty(shipped.batch, tokens, 3 * heads * shipped.size + spare, dtype=dtype)
    key_bias = empty(shipped.batch, tokens) if "bias" in shipped.variant else None
    qkv = qkv[..., : 3 * heads * shipped.size]
    rope, known = None, (shipped.arch, dtype, shipped.size)
    if shipped.operator.startswith("rotary_"):
        table = empty(tokens - 5, 2 * shipped.size)[:, : shipped.size]
        rope = (table, table, 5, "interleaved" in shipped.variant)
    if not shipped.operator.endswith("_bwd"):
        config = (
            attention_tiles.rotary_attention(*known)
            if rope
            else attention_tiles.attention(*known, tokens, tma=not spare)
        )
        if shipped.operator == "attention_lean":
            pointed = config.tma and "pointed" in shipped.variant
            keys = 128 if config.tma and tokens == 577 else 64
            config = attention_tiles.lean(config, 64, keys, 2, pointed=pointed)
        elif shipped.operator == "attention_persistent":
            config = attention_tiles.persistent(tokens)
        lse = shipped.operator.endswith("_fwd")
        return first(
            attention.plan(qkv, heads, 0.125, key_bias, rope=rope, save_lse=lse, config=config)
        )
    bwd_config = (
        attention_tiles.rotary_attention_bwd(*known)
        if rope
        else attention_tiles.attention_bwd(*known, tokens, tma=not spare)
    )
    if shipped.variant == "delta":
        bwd_config = dataclasses.replace(bwd_config, whole_head=False)
    out, row_lse = (
        empty(shipped.batch, tokens, heads * shipped.size, dtype=dtype),
        empty(shipped.batch, heads, tokens),
    )
    _, launches = attention_bwd.plan(
        out, qkv, out, row_lse, heads, 0.125, key_bias, rope=rope, config=bwd_config
    )
    return launches[0 if shipped.variant == "delta" else -1]


def _config(arch: int, dtype: torch.dtype, size: int) -> object:
    return attention_tiles.attention(arch, dtype, size, TOKENS)


def _config_lean(arch: int, dtype: torch.dtype, size: int) -> object:
    return None if dtype == torch.float32 else _config(arch, dtype, size)


def _config_persistent(arch: int, dtype: torch.dtype, size: int) -> object:
    there = arch in attention_tiles.PERSISTENT and dtype != torch.float32
    return attention_tiles.persistent(TOKENS) if there else None


def _config_bwd(arch: int, dtype: torch.dtype, size: int) -> object:
    return attention_tiles.attention_bwd(arch, dtype, size, TOKENS)


def _rotary(arch: int, dtype: torch.dtype, size: int) -> object:
    return attention_tiles.rotary_attention(arch, dtype, size)


def _rotary_bwd(arch: int, dtype: torch.dtype, size: int) -> object:
    return attention_tiles.rotary_attention_bwd(arch, dtype, size)


_KERNEL = functools.partial(
    Kernel,
    build=_attention,
    sizes=HEAD_DIMS,
    described=attention_tiles.TMA_HEAD_DIMS,
    without=("delta",),
)
KERNELS = {
    "attention": _KERNEL(("197", "197 bias", "577", "577 bias", "unaligned"), _config),
    "attention_lean": _KERNEL(
        ("197", "197 pointed", "577 pointed", "unaligned"), _config_lean, sizes=(64,)
    ),
    "attention_persistent": _KERNEL(("197",), _config_persistent, sizes=(64,)),
    "attention_fwd": _KERNEL(("197", "197 bias", "577 bias"), _config),
    "attention_bwd": _KERNEL(
        ("197", "197 bias", "577", "577 bias", "unaligned", "delta"), _config_bwd
    ),
}
_ROTARY_KERNEL = functools.partial(
    Kernel,
    ("197", "197 interleaved"),
    build=_attention,
    sizes=TRITON_ROTARY_HEAD_DIMS,
    descriptors=False,
)
KERNELS |= {
    "rotary_attention": _ROTARY_KERNEL(_rotary),
    "rotary_attention_fwd": _ROTARY_KERNEL(_rotary),
    "rotary_attention_bwd": _ROTARY_KERNEL(_rotary_bwd),
}


def _sizes(at: Terms) -> dict[str, int]:
    return {"head_dim": at.size.dim // at.size.heads, "tokens": at.size.tokens}


def tuned(at: Terms) -> Iterator[Tuned]:
    """The forward."""
    yield at.of_call("attention", _sizes(at), attention.attention)


def tuned_bwd(at: Terms) -> Iterator[Tuned]:
    """The backward."""
    heads, dim, rows = at.size.heads, at.size.dim, (at.size.batch, at.size.tokens)
    rest: tuple[Any, ...] = (heads, (dim // heads) ** -0.5, None)
    saved: list[tuple[Tensor, Tensor]] = []

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        if not saved:  # the forward is not what is timed
            saved.append(attention.attention_fwd(t[0], *rest))
        return [attention_bwd.attention_bwd(t[1], t[0], *saved[0], *rest, config=config)]

    def plain(t: Sequence[Tensor]) -> list[Tensor]:
        return gradients(lambda x: reference.attention(x, *rest), t[:1], t[1])

    shapes = [(*rows, 3 * dim), (*rows, dim)]
    yield at.of_shapes("attention_bwd", _sizes(at), shapes, run, plain)
