"""Calls of the MLP."""

from __future__ import annotations

from deit.kernels.prove.calls import Call, Draw, Part, Size, Stated


def _gelu_mlp(draw: Draw, size: Size, form: str) -> Call:
    inputs = {
        "x": draw.activation(size.batch, size.tokens, size.dim),
        "w1": draw.weight(size.hidden, size.dim, seed=1),
        "b1": draw.random(size.hidden, seed=2),
        "w2": draw.weight(size.dim, size.hidden, seed=3),
        "b2": draw.random(size.dim, seed=4),
        **draw.epilogue(form, size.batch, size.tokens, size.dim),
    }
    gradients = tuple(name for name in inputs if name != "keep")
    flops = 4.0 * size.batch * size.tokens * inputs["w1"].numel()
    options = {"activation": "quick_gelu"} if form == "every" else {}
    return Call("gelu_mlp", inputs, options, gradients, (flops, 2 * flops))


CALLS = {"gelu_mlp": Stated(_gelu_mlp, (Part("gelu_mlp + residual", lambda depth: depth),))}
