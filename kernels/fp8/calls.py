"""Calls of the products in e4m3: those of their float operators, with LayerNorm folded in."""

from __future__ import annotations

from deit.kernels.gelu_mlp.calls import CALLS as GELU_MLP
from deit.kernels.linear.calls import CALLS as LINEAR
from deit.kernels.prove.calls import Call, Draw, Size, Stated


def _eight_bits(call: Call, draw: Draw, form: str) -> Call:
    """A float operator's call as that of its counterpart, which has no stochastic depth, and no
    activation beside a residual."""
    inputs = {name: t for name, t in call.inputs.items() if name != "keep"}
    options = {name: value for name, value in call.options.items() if name != "activation"}
    if form in ("training", "every"):
        dim = inputs["x"].shape[-1]
        options["norm"] = (draw.around_one(dim, seed=41), draw.random(dim, seed=42), 1e-6)
    return Call(f"fp8_{call.operator}", inputs, options, flops=call.flops)


def _linear(draw: Draw, size: Size, form: str) -> Call:
    return _eight_bits(LINEAR["linear"].build(draw, size, form), draw, form)


def _gelu_mlp(draw: Draw, size: Size, form: str) -> Call:
    return _eight_bits(GELU_MLP["gelu_mlp"].build(draw, size, form), draw, form)


CALLS = {
    "fp8_linear": Stated(_linear),
    "fp8_gelu_mlp": Stated(_gelu_mlp),
}
