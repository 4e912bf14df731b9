"""The calls that a DeiT makes of every operator, and what each costs at least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import deit
from operators import calls
from operators.numerics_cases import Call

# Arithmetic an element of the largest input, where there is no matrix product; exp counts as one.
# LayerNorm forward: mean 1, variance 3, normalising 2, weight and bias 2; backward: x^ 2,
# g * weight 1, two sums 3, dx 4, dweight 2, dbias 1; with an addition before it one more.
# Cross-entropy: maximum, subtraction, exp, sum, smoothing's sum; backward: subtraction, exp, scale,
# target. Distillation: two of them, and the teacher's maximum.
ELEMENTWISE = {
    "layer_norm": (8, 13),
    "add_layer_norm": (9, 14),
    "cross_entropy": (5, 4),
    "distillation_loss": (11, 8),
}


@dataclass(frozen=True)
class Case:
    """One operator as a DeiT calls it; forward_calls: how often in one forward of the network."""

    name: str
    operator: str
    forward_calls: Callable[[deit.Config], int]

    def build(self, config: deit.Config, batch: int, dtype: torch.dtype, device: torch.device,
              seed: int) -> Call:  # fmt: skip
        """Its inputs at this network's sizes, drawn anew for each seed."""
        if self.name == "linear qkv":
            return qkv(config, batch, dtype, device, seed)
        return calls.build(self.operator, dtype, device, batch=batch, tokens=config.tokens,
                           dim=config.embed_dim, epilogue=False, seed=seed)  # fmt: skip


def qkv(
    config: deit.Config, batch: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Call:
    """The product that makes q, k and v: three times as many columns, no residual."""
    draw = calls.Draw("random", dtype, device, 1000 * seed)
    dim = config.embed_dim
    inputs = {
        "x": draw.activation(batch, config.tokens, dim),
        "weight": draw.weight(3 * dim, dim),
        "bias": draw(3 * dim),
    }
    return Call("linear", inputs, {}, tuple(inputs))


# A fused block calls layer_norm twice and leaves both additions to the products' epilogues, so
# that add_layer_norm and vit_block stand beside the others and count nothing.
CASES = (
    Case("linear qkv", "linear", lambda config: config.depth),
    Case("attention", "attention", lambda config: config.depth),
    Case("linear proj + residual", "linear", lambda config: config.depth),
    Case("gelu_mlp + residual", "gelu_mlp", lambda config: config.depth),
    Case("layer_norm", "layer_norm", lambda config: 2 * config.depth + 1),
    Case("patch_embed", "patch_embed", lambda _: 1),
    Case("add_layer_norm", "add_layer_norm", lambda _: 0),
    Case("vit_block", "vit_block", lambda _: 0),
    Case("cross_entropy", "cross_entropy", lambda _: 0),
    Case("distillation_loss", "distillation_loss", lambda _: 0),
)


def flops(call: Call, backward: bool) -> float:
    """Floating-point operations: of the products where there are any, else of the elements."""
    if call.operator in ELEMENTWISE:
        largest = max(math.prod(t.shape) for t in call.inputs.values())
        return float(ELEMENTWISE[call.operator][backward] * largest)
    return calls.flops(call, backward)
