"""Calls of every public operator at the shapes of a DeiT, and what they cost at least."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch import Tensor

from deit.kernels.prove import reference
from operators import numerics_cases
from operators.numerics_cases import Call

OPERATORS = ("attention", "linear", "gelu_mlp", "layer_norm", "add_layer_norm", "vit_block",
             "patch_embed", "cross_entropy", "distillation_loss")  # fmt: skip
INFERENCE = ("vit_block",)  # without a backward
FAMILIES = numerics_cases.FAMILIES
CLASSES = 1000


class Draw:
    """Tensors of one call, drawn on `device`; weights of unit gain, activations of a family."""

    def __init__(self, family: str, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.family, self.dtype, self.device, self.seed = family, dtype, device, seed

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers; drawn on the device, where a billion take milliseconds."""
        self.seed += 1
        generator = torch.Generator(self.device).manual_seed(self.seed)
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        return x.normal_(0.0, scale, generator=generator)

    def weight(self, *shape: int) -> Tensor:
        return self(*shape, scale=math.prod(shape[1:]) ** -0.5)

    def activation(self, *shape: int, scale: float = 1.0, mean: float = 1000.0) -> Tensor:
        if self.family in ("random", "one_hot"):
            return self(*shape, scale=scale)
        self.seed += 1
        drawn = oracle.make(self.family, shape, self.dtype, seed=self.seed, scale=scale, mean=mean)
        return drawn.to(self.device)


def build(
    operator: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int,
    tokens: int,
    dim: int,
    family: str = "random",
    epilogue: bool = True,
    seed: int = 0,
) -> Call:
    """One call; `tokens` becomes the nearest number of patches and prefixes for patch_embed.

    epilogue: with LayerScale and stochastic depth; else with the residual alone, as inference
    of a DeiT has it.
    """
    draw = Draw(family, dtype, device, 1000 * seed)
    return _BUILDERS[operator](draw, batch, tokens, dim, epilogue)


def _epilogue(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> dict[str, Tensor]:
    found = {"residual": draw(batch, tokens, dim)}
    if full:
        keep = torch.full((batch,), 1.25, dtype=draw.dtype, device=draw.device)
        keep[1::2] = 0.0
        found |= {"gamma": draw(dim), "keep": keep}
    return found


def _attention(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    shape = (batch, tokens, dim)
    if draw.family == "one_hot":  # scores of standard deviation 25
        q, k, v = (draw(*shape, scale=5.0) for _ in range(3))
    elif draw.family == "random":
        return Call("attention", {"qkv": draw(batch, tokens, 3 * dim)},
                    {"num_heads": max(1, dim // 64)}, ("qkv",))  # fmt: skip
    else:  # a large mean is for v alone: in q and k it would make every softmax an argmax
        q = draw.activation(*shape, scale=0.5, mean=8.0)
        k = draw.activation(*shape, scale=0.5, mean=8.0)
        v = draw.activation(*shape)
        if draw.family == "outlier":
            k = draw(*shape, scale=0.05)
    inputs = {"qkv": torch.cat([q, k, v], -1)}
    return Call("attention", inputs, {"num_heads": max(1, dim // 64)}, ("qkv",))


def _linear(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    inputs = {
        "x": draw.activation(batch, tokens, dim, mean=100.0),
        "weight": draw.weight(dim, dim),
        "bias": draw(dim),
        **_epilogue(draw, batch, tokens, dim, full),
    }
    names = tuple(n for n in inputs if n != "keep")
    return Call("linear", inputs, {"activation": "gelu"} if full else {}, names)


def _gelu_mlp(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    inputs = {
        "x": draw.activation(batch, tokens, dim, mean=100.0),
        "w1": draw.weight(4 * dim, dim),
        "b1": draw(4 * dim),
        "w2": draw.weight(dim, 4 * dim),
        "b2": draw(dim),
        **_epilogue(draw, batch, tokens, dim, full),
    }
    return Call("gelu_mlp", inputs, {}, tuple(n for n in inputs if n != "keep"))


def _layer_norm(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    inputs = {
        "x": draw.activation(batch, tokens, dim),
        "weight": 1 + draw(dim, scale=0.1),
        "bias": draw(dim),
    }
    return Call("layer_norm", inputs, {"eps": 1e-6}, tuple(inputs))


def _add_layer_norm(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    inputs = _layer_norm(draw, batch, tokens, dim, full).inputs
    inputs |= _epilogue(draw, batch, tokens, dim, full)
    names = tuple(n for n in inputs if n != "keep")
    return Call("add_layer_norm", inputs, {"eps": 1e-6}, names)


def _vit_block(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    """As within a chain of blocks: the statistics come with x."""
    inputs = {"x": draw.activation(batch, tokens, dim)}
    for norm in ("norm1", "norm2"):
        inputs |= {f"{norm}_weight": 1 + draw(dim, scale=0.1), f"{norm}_bias": draw(dim)}
    for name, rows in (("qkv", 3 * dim), ("proj", dim)):
        inputs |= {f"{name}_weight": draw.weight(rows, dim), f"{name}_bias": draw(rows)}
    inputs |= {"w1": draw.weight(4 * dim, dim), "b1": draw(4 * dim)}
    inputs |= {"w2": draw.weight(dim, 4 * dim), "b2": draw(dim)}
    if full:
        inputs |= {"gamma1": draw(dim), "gamma2": draw(dim)}
    else:
        inputs["row_stats"] = reference.row_stats(inputs["x"])
    return Call("vit_block", inputs, {"num_heads": max(1, dim // 64)}, ())


def _patch_embed(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    side = max(1, math.isqrt(tokens))
    prefix = 2 if full else 1
    inputs = {
        "images": draw.activation(batch, 3, 16 * side, 16 * side, mean=100.0),
        "weight": draw.weight(dim, 3, 16, 16),
        "bias": draw(dim),
        "prefix": draw(1, prefix, dim),
        "pos_embed": draw(1, prefix + side * side, dim),
    }
    return Call("patch_embed", inputs, {}, tuple(inputs)[1:])


def _logits(draw: Draw, batch: int) -> Tensor:
    if draw.family == "one_hot":
        return draw(batch, CLASSES, scale=25.0)
    return draw.activation(batch, CLASSES)


def _cross_entropy(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    inputs = {"logits": _logits(draw, batch), "target": _target(draw, batch)}
    return Call("cross_entropy", inputs, {"label_smoothing": 0.1}, ("logits",))


def _distillation_loss(draw: Draw, batch: int, tokens: int, dim: int, full: bool) -> Call:
    inputs = _cross_entropy(draw, batch, tokens, dim, full).inputs
    inputs["teacher_logits"] = _logits(draw, batch)
    inputs["distillation_logits"] = _logits(draw, batch)
    options = {"kind": "soft" if full else "hard"}
    return Call("distillation_loss", inputs, options, ("logits", "distillation_logits"))


def _target(draw: Draw, batch: int) -> Tensor:
    draw.seed += 1
    generator = torch.Generator().manual_seed(draw.seed)
    return torch.randint(CLASSES, (batch,), generator=generator).to(draw.device)


_BUILDERS: dict[str, Callable[[Draw, int, int, int, bool], Call]] = {
    name: globals()[f"_{name}"] for name in OPERATORS
}


def flops(call: Call, backward: bool) -> float:
    """Floating-point operations of the matrix products, two a multiply-add."""
    shape = {name: tuple(t.shape) for name, t in call.inputs.items()}
    if call.operator == "attention":
        batch, tokens, channels = shape["qkv"]
        return (10 if backward else 4) * batch * tokens * tokens * (channels / 3)
    if call.operator == "vit_block":
        batch, tokens, dim = shape["x"]
        weights = sum(math.prod(shape[n]) for n in ("qkv_weight", "proj_weight", "w1", "w2"))
        return 2.0 * batch * tokens * weights + 4.0 * batch * tokens * tokens * dim
    if call.operator in ("linear", "gelu_mlp"):
        rows = math.prod(shape["x"][:-1])
        weights = sum(math.prod(shape[n]) for n in ("weight", "w1", "w2") if n in shape)
        return (4.0 if backward else 2.0) * rows * weights
    if call.operator == "patch_embed":  # no gradient for the images: as many again
        pixels = math.prod(shape["images"])
        return 2.0 * pixels * shape["weight"][0]
    return 0.0


def traffic(call: Call, outputs: list[Tensor], backward: bool) -> float:
    """Bytes that must move: every input and output once, with their gradients in the backward."""
    size = lambda tensors: float(sum(t.numel() * t.element_size() for t in tensors))
    read, written = size(call.inputs.values()), size(outputs)
    if not backward:
        return read + written
    return read + written + size(call.inputs[n] for n in call.gradients)


def function(call: Call, impl: str) -> Callable[..., Any]:
    """The public operator by one implementation, on tensors by name."""
    import deit.kernels

    operator = getattr(deit.kernels, call.operator)
    return lambda inputs: operator(**inputs, **call.options, impl=impl)


def by_parts(call: Call, impl: str) -> Callable[..., Any]:
    """A vit_block of the other public operators, as `fuse` runs a block by default."""
    from deit.kernels import attention, gelu_mlp, layer_norm, linear

    heads = call.options["num_heads"]

    def run(t: dict[str, Tensor]) -> Tensor:
        normed = layer_norm(t["x"], t["norm1_weight"], t["norm1_bias"], impl=impl)
        qkv = linear(normed, t["qkv_weight"], t["qkv_bias"], impl=impl)
        mixed = attention(qkv, heads, impl=impl)
        gammas = t.get("gamma1"), t.get("gamma2")
        s = linear(mixed, t["proj_weight"], t["proj_bias"], residual=t["x"], gamma=gammas[0],
                   impl=impl)  # fmt: skip
        normed = layer_norm(s, t["norm2_weight"], t["norm2_bias"], impl=impl)
        return gelu_mlp(normed, t["w1"], t["b1"], t["w2"], t["b2"], residual=s, gamma=gammas[1],
                        impl=impl)  # fmt: skip

    return run
