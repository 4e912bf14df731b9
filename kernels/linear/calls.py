"""Calls of a linear layer."""

from __future__ import annotations

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


_PARTS = (
    Part("linear qkv", lambda depth: depth, "least", columns=3),
    Part("linear proj + residual", lambda depth: depth),
)
CALLS = {"linear": Stated(_linear, _PARTS)}
