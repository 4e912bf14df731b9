"""What bench/numerics.py calls: every public operator on every input family."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from torch import Tensor

FAMILIES = (*oracle.FAMILIES, "one_hot")
_BATCH, _TOKENS, _DIM, _HEADS, _CLASSES = 2, 70, 192, 3, 1000


@dataclass(frozen=True)
class Call:
    """One call of a public operator.

    inputs: its tensors by name, floating-point ones in the call's dtype.
    options: its other arguments by name.
    gradients: the inputs that training differentiates by.
    """

    operator: str
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    gradients: tuple[str, ...]


def calls(family: str, dtype: torch.dtype, draw: int = 0) -> Iterator[Call]:
    """Every operator that has this family, with its optional inputs present.

    The families of tests/oracle.py are those of an operator's activations; weights are random, of
    unit gain. "one_hot": a softmax of which one entry takes nearly everything. `draw` numbers
    independent draws of all of it.
    """
    for build in _SOFTMAX if family == "one_hot" else (*_OTHERS, *_SOFTMAX):
        yield build(Inputs(family, dtype, draw))


@dataclass(frozen=True)
class Inputs:
    """Tensors of one family, dtype and draw."""

    family: str
    dtype: torch.dtype
    draw: int

    def make(self, family: str, *shape: int, seed: int, **options: float) -> Tensor:
        return oracle.make(family, shape, self.dtype, seed=seed + 100 * self.draw, **options)

    def random(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return self.make("random", *shape, seed=seed, scale=scale)

    def weight(self, *shape: int, seed: int) -> Tensor:
        return self.random(*shape, seed=seed, scale=math.prod(shape[1:]) ** -0.5)

    def activation(self) -> Tensor:
        return self.make(self.family, _BATCH, _TOKENS, _DIM, seed=0)

    def logits(self, seed: int) -> Tensor:
        if self.family == "one_hot":
            return self.random(_TOKENS, _CLASSES, seed=seed, scale=25.0)
        return self.make(self.family, _TOKENS, _CLASSES, seed=seed)

    def target(self) -> Tensor:
        generator = torch.Generator().manual_seed(5 + 100 * self.draw)
        return torch.randint(_CLASSES, (_TOKENS,), generator=generator)

    def epilogue(self) -> dict[str, Tensor]:
        """Residual, LayerScale and stochastic depth, the second sample dropped."""
        return {
            "residual": self.random(_BATCH, _TOKENS, _DIM, seed=21),
            "gamma": self.random(_DIM, seed=22),
            "keep": torch.tensor([1.25, 0.0], dtype=self.dtype),
        }


def _layer_norm(given: Inputs) -> Call:
    inputs = {
        "x": given.activation(),
        "weight": 1 + given.random(_DIM, seed=1, scale=0.1),
        "bias": given.random(_DIM, seed=2),
    }
    return Call("layer_norm", inputs, {"eps": 1e-6}, ("x", "weight", "bias"))


def _add_layer_norm(given: Inputs) -> Call:
    norm = _layer_norm(given).inputs
    epilogue = given.epilogue()
    inputs = {"x": norm["x"], "residual": epilogue["residual"]}
    inputs |= {"weight": norm["weight"], "bias": norm["bias"]}
    inputs |= {"gamma": epilogue["gamma"], "keep": epilogue["keep"]}
    names = ("x", "residual", "weight", "bias", "gamma")
    return Call("add_layer_norm", inputs, {"eps": 1e-6}, names)


def _linear(given: Inputs) -> Call:
    inputs = {
        "x": given.activation(),
        "weight": given.weight(_DIM, _DIM, seed=1),
        "bias": given.random(_DIM, seed=2),
        **given.epilogue(),
    }
    names = ("x", "weight", "bias", "residual", "gamma")
    return Call("linear", inputs, {"activation": "gelu"}, names)


def _gelu_mlp(given: Inputs) -> Call:
    inputs = {
        "x": given.activation(),
        "w1": given.weight(4 * _DIM, _DIM, seed=1),
        "b1": given.random(4 * _DIM, seed=2),
        "w2": given.weight(_DIM, 4 * _DIM, seed=3),
        "b2": given.random(_DIM, seed=4),
        **given.epilogue(),
    }
    return Call("gelu_mlp", inputs, {}, ("x", "w1", "b1", "w2", "b2", "residual", "gamma"))


def _vit_block(given: Inputs) -> Call:
    """Inference only, so it has no gradients."""
    inputs = {"x": given.activation()}
    for norm in ("norm1", "norm2"):
        inputs[f"{norm}_weight"] = 1 + given.random(_DIM, seed=len(inputs), scale=0.1)
        inputs[f"{norm}_bias"] = given.random(_DIM, seed=len(inputs))
    shapes = {"qkv_": (3 * _DIM, _DIM), "proj_": (_DIM, _DIM), "1": (4 * _DIM, _DIM),
              "2": (_DIM, 4 * _DIM)}  # fmt: skip
    for name, shape in shapes.items():
        weight, bias = (name + "weight", name + "bias") if "_" in name else ("w" + name, "b" + name)
        inputs[weight] = given.weight(*shape, seed=len(inputs))
        inputs[bias] = given.random(shape[0], seed=len(inputs))
    inputs |= {"gamma1": given.random(_DIM, seed=31), "gamma2": given.random(_DIM, seed=32)}
    return Call("vit_block", inputs, {"num_heads": _HEADS}, ())


def _patch_embed(given: Inputs) -> Call:
    inputs = {
        "images": given.make(given.family, _BATCH, 3, 64, 64, seed=0),
        "weight": given.weight(_DIM, 3, 16, 16, seed=1),
        "bias": given.random(_DIM, seed=2),
        "prefix": given.random(1, 2, _DIM, seed=3),
        "pos_embed": given.random(1, 18, _DIM, seed=4),
    }
    return Call("patch_embed", inputs, {}, ("weight", "bias", "prefix", "pos_embed"))


def _attention(given: Inputs) -> Call:
    """The families of `oracle.packed`.

    In Triton's interpreter q and k are multiples of 1/64, which makes scores exact in fp32: its
    BLAS sums q kT and k qT in different orders, the GPU's products in one.
    """
    seed = 1 + 100 * given.draw
    qkv = oracle.packed(given.family, _BATCH, _TOKENS, _HEADS, dtype=torch.float32, seed=seed)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        qkv[..., : 2 * _DIM] = (qkv[..., : 2 * _DIM] * 64).round() / 64
    inputs = {"qkv": qkv.to(given.dtype)}
    return Call("attention", inputs, {"num_heads": _HEADS}, ("qkv",))


def _cross_entropy(given: Inputs) -> Call:
    inputs = {"logits": given.logits(1), "target": given.target()}
    return Call("cross_entropy", inputs, {"label_smoothing": 0.1}, ("logits",))


def _distillation(given: Inputs) -> Call:
    inputs = {"logits": given.logits(1), "target": given.target()}
    inputs["teacher_logits"] = given.logits(2)
    inputs["distillation_logits"] = given.logits(3)
    names = ("logits", "distillation_logits")
    return Call("distillation_loss", inputs, {"kind": "soft"}, names)


_OTHERS: tuple[Callable[[Inputs], Call], ...] = (
    _layer_norm, _add_layer_norm, _linear, _gelu_mlp, _vit_block, _patch_embed
)  # fmt: skip
_SOFTMAX: tuple[Callable[[Inputs], Call], ...] = (_attention, _cross_entropy, _distillation)
