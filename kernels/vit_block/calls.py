"""Calls of a whole block, in inference, and the block by its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deit.kernels.prove.calls import Call, Draw, Size, Stated
from deit.kernels.vit_block import reference


def _vit_block(draw: Draw, size: Size, form: str) -> Call:
    """In inference as within a chain of blocks: the statistics come with x."""
    dim, hidden = size.dim, size.hidden
    inputs = {"x": draw.activation(size.batch, size.tokens, dim)}

    def add(weight: str, bias: str, *shape: int) -> None:
        if len(shape) > 1:
            inputs[weight] = draw.weight(*shape, seed=len(inputs))
        else:
            inputs[weight] = draw.around_one(*shape, seed=len(inputs))
        inputs[bias] = draw.random(shape[0], seed=len(inputs))

    add("norm1_weight", "norm1_bias", dim)
    add("norm2_weight", "norm2_bias", dim)
    add("qkv_weight", "qkv_bias", 3 * dim, dim)
    add("proj_weight", "proj_bias", dim, dim)
    add("w1", "b1", hidden, dim)
    add("w2", "b2", dim, hidden)
    options: dict[str, Any] = {"num_heads": size.heads}
    if form in ("training", "every"):
        inputs |= {"gamma1": draw.random(dim, seed=31), "gamma2": draw.random(dim, seed=32)}
    if form == "every":
        options |= {"scale": 0.1, "eps": 1e-5, "activation": "quick_gelu"}
        inputs["key_bias"] = draw.random(size.batch, size.tokens, seed=33)
    if form in ("inference", "every"):
        inputs["row_stats"] = reference.row_stats(inputs["x"])
    rows = size.batch * size.tokens
    weights = sum(inputs[name].numel() for name in ("qkv_weight", "proj_weight", "w1", "w2"))
    flops = 2.0 * rows * weights + 4.0 * rows * size.tokens * dim
    return Call("vit_block", inputs, options, (), (flops, 0.0))


def by_parts(call: Call, impl: str) -> Callable[[dict[str, Tensor]], Tensor]:
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


CALLS = {"vit_block": Stated(_vit_block)}  # a fused block runs by parts or as this one
