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


def calls(family: str, dtype: torch.dtype) -> Iterator[Call]:
    """Every operator that has this family, with its optional inputs present.

    The families of tests/oracle.py are those of an operator's activations; weights are random, of
    unit gain. "one_hot": a softmax of which one entry takes nearly everything.
    """
    for build in _SOFTMAX if family == "one_hot" else (*_OTHERS, *_SOFTMAX):
        yield build(family, dtype)


def _random(dtype: torch.dtype, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return oracle.make("random", shape, dtype, seed=seed, scale=scale)


def _weight(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return _random(dtype, *shape, seed=seed, scale=math.prod(shape[1:]) ** -0.5)


def _activation(family: str, dtype: torch.dtype, *, mean: float = 1000.0, seed: int = 0) -> Tensor:
    return oracle.make(family, (_BATCH, _TOKENS, _DIM), dtype, seed=seed, mean=mean)


def _epilogue(dtype: torch.dtype) -> dict[str, Tensor]:
    """Residual, LayerScale and stochastic depth, the second sample dropped."""
    return {
        "residual": _random(dtype, _BATCH, _TOKENS, _DIM, seed=21),
        "gamma": _random(dtype, _DIM, seed=22),
        "keep": torch.tensor([1.25, 0.0], dtype=dtype),
    }


def _layer_norm(family: str, dtype: torch.dtype) -> Call:
    inputs = {
        "x": _activation(family, dtype),
        "weight": 1 + _random(dtype, _DIM, seed=1, scale=0.1),
        "bias": _random(dtype, _DIM, seed=2),
    }
    return Call("layer_norm", inputs, {"eps": 1e-6}, ("x", "weight", "bias"))


def _add_layer_norm(family: str, dtype: torch.dtype) -> Call:
    norm = _layer_norm(family, dtype).inputs
    epilogue = _epilogue(dtype)
    inputs = {"x": norm["x"], "residual": epilogue["residual"]}
    inputs |= {"weight": norm["weight"], "bias": norm["bias"]}
    inputs |= {"gamma": epilogue["gamma"], "keep": epilogue["keep"]}
    names = ("x", "residual", "weight", "bias", "gamma")
    return Call("add_layer_norm", inputs, {"eps": 1e-6}, names)


def _linear(family: str, dtype: torch.dtype) -> Call:
    inputs = {
        "x": _activation(family, dtype, mean=100.0),
        "weight": _weight(dtype, _DIM, _DIM, seed=1),
        "bias": _random(dtype, _DIM, seed=2),
        **_epilogue(dtype),
    }
    names = ("x", "weight", "bias", "residual", "gamma")
    return Call("linear", inputs, {"activation": "gelu"}, names)


def _gelu_mlp(family: str, dtype: torch.dtype) -> Call:
    inputs = {
        "x": _activation(family, dtype, mean=100.0),
        "w1": _weight(dtype, 4 * _DIM, _DIM, seed=1),
        "b1": _random(dtype, 4 * _DIM, seed=2),
        "w2": _weight(dtype, _DIM, 4 * _DIM, seed=3),
        "b2": _random(dtype, _DIM, seed=4),
        **_epilogue(dtype),
    }
    return Call("gelu_mlp", inputs, {}, ("x", "w1", "b1", "w2", "b2", "residual", "gamma"))


def _vit_block(family: str, dtype: torch.dtype) -> Call:
    """Inference only, so it has no gradients."""
    inputs = {"x": _activation(family, dtype)}
    for norm in ("norm1", "norm2"):
        inputs[f"{norm}_weight"] = 1 + _random(dtype, _DIM, seed=len(inputs), scale=0.1)
        inputs[f"{norm}_bias"] = _random(dtype, _DIM, seed=len(inputs))
    shapes = {"qkv_": (3 * _DIM, _DIM), "proj_": (_DIM, _DIM), "1": (4 * _DIM, _DIM),
              "2": (_DIM, 4 * _DIM)}  # fmt: skip
    for name, shape in shapes.items():
        weight, bias = (name + "weight", name + "bias") if "_" in name else ("w" + name, "b" + name)
        inputs[weight] = _weight(dtype, *shape, seed=len(inputs))
        inputs[bias] = _random(dtype, shape[0], seed=len(inputs))
    inputs |= {"gamma1": _random(dtype, _DIM, seed=31), "gamma2": _random(dtype, _DIM, seed=32)}
    return Call("vit_block", inputs, {"num_heads": _HEADS}, ())


def _patch_embed(family: str, dtype: torch.dtype) -> Call:
    inputs = {
        "images": oracle.make(family, (_BATCH, 3, 64, 64), dtype, mean=100.0),
        "weight": _weight(dtype, _DIM, 3, 16, 16, seed=1),
        "bias": _random(dtype, _DIM, seed=2),
        "prefix": _random(dtype, 1, 2, _DIM, seed=3),
        "pos_embed": _random(dtype, 1, 18, _DIM, seed=4),
    }
    return Call("patch_embed", inputs, {}, ("weight", "bias", "prefix", "pos_embed"))


def _attention(family: str, dtype: torch.dtype) -> Call:
    """Means are 8: at 1000 every softmax is an argmax, and dp - delta nothing but noise.

    In Triton's interpreter q and k are multiples of 1/64, which makes scores exact in fp32: its
    BLAS sums q kT and k qT in different orders, the GPU's products in one.
    """
    shape = (_BATCH, _TOKENS, _DIM)
    size = 5.0 if family == "one_hot" else 0.5  # one_hot: scores of standard deviation 25
    known = "random" if family == "one_hot" else family
    q, k, v = (
        oracle.make(known, shape, seed=seed, scale=scale, mean=8.0)
        for seed, scale in ((1, size), (2, size), (3, 1.0))
    )
    if family == "outlier":  # outlier channels times each other would be scores of 10^4
        k = oracle.make("random", shape, seed=2, scale=0.05)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        q, k = ((t * 64).round() / 64 for t in (q, k))
    qkv = torch.cat([q, k, v], -1).to(dtype)
    return Call("attention", {"qkv": qkv}, {"num_heads": _HEADS}, ("qkv",))


def _logits(family: str, dtype: torch.dtype, seed: int) -> Tensor:
    if family == "one_hot":
        return _random(dtype, _TOKENS, _CLASSES, seed=seed, scale=25.0)
    return oracle.make(family, (_TOKENS, _CLASSES), dtype, seed=seed)


def _target() -> Tensor:
    return torch.randint(_CLASSES, (_TOKENS,), generator=torch.Generator().manual_seed(5))


def _cross_entropy(family: str, dtype: torch.dtype) -> Call:
    inputs = {"logits": _logits(family, dtype, 1), "target": _target()}
    return Call("cross_entropy", inputs, {"label_smoothing": 0.1}, ("logits",))


def _distillation(family: str, dtype: torch.dtype) -> Call:
    inputs = {"logits": _logits(family, dtype, 1), "target": _target()}
    inputs["teacher_logits"] = _logits(family, dtype, 2)
    inputs["distillation_logits"] = _logits(family, dtype, 3)
    names = ("logits", "distillation_logits")
    return Call("distillation_loss", inputs, {"kind": "soft"}, names)


_OTHERS: tuple[Callable[[str, torch.dtype], Call], ...] = (
    _layer_norm, _add_layer_norm, _linear, _gelu_mlp, _vit_block, _patch_embed
)  # fmt: skip
_SOFTMAX: tuple[Callable[[str, torch.dtype], Call], ...] = (
    _attention, _cross_entropy, _distillation
)  # fmt: skip
