"""Calls of attention."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deit.kernels.prove import oracle
from deit.kernels.prove.calls import Call, Draw, Part, Size, Stated


def _attention(draw: Draw, size: Size, form: str) -> Call:
    """The families of `oracle.packed`."""
    inputs = {"qkv": packed(draw, size)}
    options: dict[str, Any] = {"num_heads": size.heads}
    if form == "every":
        options["scale"] = 0.2
        inputs["key_bias"] = draw.random(size.batch, size.tokens, seed=4)
    products = float(size.batch * size.tokens**2 * size.dim)
    return Call("attention", inputs, options, ("qkv",), (4 * products, 10 * products))


def _rotary(draw: Draw, size: Size, form: str) -> Call:
    """Positions of any angle after one prefix token; in "every" form tables by head and pairs of
    neighbours."""
    call, head_dim = _attention(draw, size, "least"), size.dim // size.heads
    prefix = min(2 if form == "every" else 1, size.tokens)
    shape: tuple[int, ...] = (size.tokens - prefix, head_dim)
    if form == "every":
        shape = (size.heads, *shape)
        call.options.update(scale=0.2, interleaved=True)
    angles = draw.random(*shape, seed=5, scale=3.0)
    if _interpreted() and draw.family == "one_hot":  # quarter turns keep such scores exact
        angles = (angles.float().round() * math.pi / 2).to(angles.dtype)
        tables = {"sin": angles.sin().round(), "cos": angles.cos().round()}
    else:
        tables = {"sin": angles.sin(), "cos": angles.cos()}
    options = {**call.options, "prefix": prefix}
    return replace(call, operator="rotary_attention", inputs=call.inputs | tables, options=options)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def packed(draw: Draw, size: Size) -> Tensor:
    """In Triton's interpreter q and k are multiples of 1/64, which makes scores exact in fp32. Its
    BLAS sums q kT and k qT in different orders, where the GPU's products have one order."""
    shape = (size.batch, size.tokens, 3 * size.dim)
    if draw.device.type != "cpu" and draw.family == "random":
        return draw.random(*shape, seed=1)
    head_dim, seed = size.dim // size.heads, 1 + 100 * draw.number
    given = (size.batch, size.tokens, size.heads, head_dim, torch.float32)
    qkv = oracle.packed(draw.family, *given, seed=seed)
    if _interpreted():
        qkv[..., : 2 * size.dim] = (qkv[..., : 2 * size.dim] * 64).round() / 64
    return qkv.to(draw.device, draw.dtype)


CALLS = {
    "attention": Stated(_attention, (Part("attention", lambda depth: depth),), softmax=True),
    "rotary_attention": Stated(_rotary, softmax=True),
}
