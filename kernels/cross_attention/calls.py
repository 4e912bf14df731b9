"""Calls of cross-attention: one query an image, as the class token's in the last block."""

from __future__ import annotations

from typing import Any

from deit.kernels.attention.calls import packed
from deit.kernels.prove.calls import Call, Draw, Size, Stated


def _cross_attention(draw: Draw, size: Size, form: str) -> Call:
    """Queries, keys and values of one projection's families; in "every" form of three tokens."""
    queries = min(3 if form == "every" else 1, size.tokens)
    qkv = packed(draw, size)
    inputs = {"q": qkv[:, :queries, : size.dim], "kv": qkv[..., size.dim :]}
    options: dict[str, Any] = {"num_heads": size.heads}
    if form == "every":
        options["scale"] = 0.2
    products = float(size.batch * queries * size.tokens * size.dim)
    return Call("cross_attention", inputs, options, ("q", "kv"), (4 * products, 10 * products))


CALLS = {"cross_attention": Stated(_cross_attention, softmax=True)}
