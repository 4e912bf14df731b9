"""Calls of a linear layer."""

from __future__ import annotations

from dataclasses import replace

from deit.kernels.prove.calls import Call, Draw, Part, Size, Stated


def _linear(draw: Draw, size: Size, form: str) -> Call:
    inputs = {
        "x": draw.activation(size.batch, size.tokens, size.dim),
        "weight": draw.weight(size.width, size.dim, seed=1),
        "bias": draw.random(size.width, seed=2),
        **draw.epilogue(form, size.batch, size.tokens, size.width),
    }
    options = {} if form in ("least", "inference") else {"activation": "gelu"}
    gradients = tuple(name for name in inputs if name != "keep")
    flops = 2.0 * size.batch * size.tokens * inputs["weight"].numel()
    return Call("linear", inputs, options, gradients, (flops, 2 * flops))


def _qkv(draw: Draw, size: Size) -> Call:
    """Three times as many columns, no residual."""
    return _linear(draw, replace(size, width=3 * size.dim), "least")


CALLS = {
    "linear": Stated(
        _linear,
        (
            Part("linear qkv", _qkv, lambda n: n),
            Part("linear proj + residual", lambda d, s: _linear(d, s, "inference"), lambda n: n),
        ),
    )
}
