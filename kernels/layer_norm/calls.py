"""Calls of the LayerNorms and of RMSNorm."""

from __future__ import annotations

from deit.kernels.prove.calls import Call, Draw, Part, Size, Stated

# Arithmetic an element. Forward: mean 1, variance 3, normalising 2, weight and bias 2; backward:
# x^ 2, g * weight 1, two sums 3, dx 4, dweight 2, dbias 1; with an addition before it one more.
_FLOPS = (8, 13)


def _layer_norm(draw: Draw, size: Size, form: str) -> Call:
    x = draw.activation(size.batch, size.tokens, size.dim)
    weight, bias = draw.around_one(size.dim, seed=1), draw.random(size.dim, seed=2)
    inputs = {"x": x, "weight": weight, "bias": bias}
    forward, backward = (float(each * x.numel()) for each in _FLOPS)
    eps = {"least": {}, "every": {"eps": 1e-5}}.get(form, {"eps": 1e-6})
    return Call("layer_norm", inputs, eps, tuple(inputs), (forward, backward))


def _rms_norm(draw: Draw, size: Size, form: str) -> Call:
    norm = _layer_norm(draw, size, form)
    inputs = {name: norm.inputs[name] for name in ("x", "weight")}
    # Neither a mean to take off, forward or backward, nor a bias.
    forward, backward = (each - 3 * inputs["x"].numel() for each in norm.flops)
    return Call("rms_norm", inputs, norm.options, tuple(inputs), (forward, backward))


def _add_layer_norm(draw: Draw, size: Size, form: str) -> Call:
    norm = _layer_norm(draw, size, form)
    x, weight, bias = norm.inputs.values()
    # The residual is one of the arguments that it must have.
    added = draw.epilogue("inference" if form == "least" else form, *x.shape)
    inputs = {"x": x, "residual": added.pop("residual"), "weight": weight, "bias": bias, **added}
    gradients = tuple(name for name in inputs if name != "keep")
    forward, backward = (each + x.numel() for each in norm.flops)
    return Call("add_layer_norm", inputs, norm.options, gradients, (forward, backward))


# A fused block leaves both additions to the products' epilogues.
CALLS = {
    "layer_norm": Stated(_layer_norm, (Part("layer_norm", lambda depth: 2 * depth + 1),)),
    "add_layer_norm": Stated(_add_layer_norm),
    "rms_norm": Stated(_rms_norm),  # no DeiT has one
}
