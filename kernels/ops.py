"""The operators' schemas and their fakes, in torch alone.

Each operator has one schema. It is defined once for every compiled implementation, in that
implementation's own namespace (`torch.ops.deit_triton.attention`, `torch.ops.deit_cpu.layer_norm`,
...), so a captured graph says which kernel it will run, and no kernel has to be loaded to trace.

Registration is `torch.library.define` + `impl` rather than `custom_op`: an inference call of the
former costs about a third of the latter's host time (5.7 against 16.8 us).

Shapes: B images, N tokens, D = H * d channels, T = B * N rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

# Arguments are positional and in the order in which every implementation, the reference
# included, takes them. Sources: LayerNorm, arXiv 1607.06450; attention, arXiv 1706.03762;
# GELU, arXiv 1606.08415; stochastic depth (`keep`), arXiv 1603.09382; LayerScale (`gamma`),
# arXiv 2103.17239; the distillation losses, arXiv 2012.12877, eq. (2) and (3).
SCHEMAS: dict[str, str] = {
    "layer_norm": "(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    "add_layer_norm": (
        "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, "
        "Tensor? gamma, Tensor? keep) -> (Tensor, Tensor)"
    ),
    "attention": "(Tensor qkv, int num_heads, float scale, Tensor? key_bias) -> Tensor",
    "linear": (
        "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, "
        "Tensor? gamma, Tensor? keep) -> Tensor"
    ),
    "gelu_mlp": (
        "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, "
        "Tensor? gamma, Tensor? keep) -> Tensor"
    ),
    "patch_embed": (
        "(Tensor images, Tensor weight, Tensor? bias, Tensor prefix, Tensor pos_embed) -> Tensor"
    ),
    "cross_entropy": "(Tensor logits, Tensor target, float label_smoothing) -> Tensor",
    "distillation_loss": (
        "(Tensor logits, Tensor target, Tensor teacher_logits, Tensor? distillation_logits, "
        "str kind, float alpha, float temperature, float label_smoothing, str kl_reduction) "
        "-> Tensor"
    ),
}

NAMESPACES: dict[str, str] = {"cpu": "deit_cpu", "triton": "deit_triton", "cuda": "deit_cuda"}

# Which operators each implementation has kernels for. The two native lists are what csrc/ holds;
# a built library that lacks one of them is reported by native.py, not discovered by a call.
KERNELS: dict[str, frozenset[str]] = {
    "cpu": frozenset({"layer_norm", "add_layer_norm", "attention", "linear", "gelu_mlp"}),
    "triton": frozenset({"layer_norm", "add_layer_norm", "attention", "linear", "gelu_mlp"}),
    "cuda": frozenset({"layer_norm", "add_layer_norm"}),
}


def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_layer_norm_fake(x: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def _attention_fake(qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None) -> Tensor:
    batch, tokens, channels = qkv.shape
    return qkv.new_empty((batch, tokens, channels // 3))


def _projected(x: Tensor, width: int, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else residual.dtype
    return x.new_empty((*x.shape[:-1], width), dtype=dtype)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    return _projected(x, weight.shape[0], residual)


def _gelu_mlp_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    return _projected(x, w2.shape[0], residual)


def _patch_embed_fake(
    images: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor, pos_embed: Tensor
) -> Tensor:
    return images.new_empty((images.shape[0], pos_embed.shape[1], weight.shape[0]))


def _scalar_loss_fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


FAKES: dict[str, Callable[..., object]] = {
    "layer_norm": _layer_norm_fake,
    "add_layer_norm": _add_layer_norm_fake,
    "attention": _attention_fake,
    "linear": _linear_fake,
    "gelu_mlp": _gelu_mlp_fake,
    "patch_embed": _patch_embed_fake,
    "cross_entropy": _scalar_loss_fake,
    "distillation_loss": _scalar_loss_fake,
}


# The CPU's operators that are oneDNN's products rather than kernels of csrc/cpu.
ONEDNN = frozenset({"linear", "gelu_mlp"})


def _launcher(module: str, name: str) -> Callable[..., object]:
    """A stand-in that imports the operator's module on its first call, not before."""

    def launch(*args: object) -> object:
        return getattr(importlib.import_module(f"deit.kernels.{module}"), name)(*args)

    return launch


def _triton_module(name: str) -> str:
    return "triton." + {"add_layer_norm": "layer_norm"}.get(name, name)


def _register() -> dict[str, dict[str, torch._ops.OpOverload]]:
    compiled: dict[str, dict[str, torch._ops.OpOverload]] = {}
    for implementation, namespace in NAMESPACES.items():
        compiled[implementation] = {}
        for name, schema in SCHEMAS.items():
            qualified = f"{namespace}::{name}"
            torch.library.define(qualified, schema)
            torch.library.register_fake(qualified, FAKES[name])
            if implementation == "triton" and name in KERNELS["triton"]:
                # The CPU key serves Triton's interpreter; dispatch refuses it otherwise.
                launch = _launcher(_triton_module(name), name)
                torch.library.impl(qualified, ("CUDA", "CPU"))(launch)
            elif implementation == "cpu" and name in ONEDNN:
                torch.library.impl(qualified, "CPU")(_launcher("onednn", name))
            compiled[implementation][name] = getattr(getattr(torch.ops, namespace), name).default
    return compiled


# implementation -> operator -> the callable overload; its kernels may not be loaded yet.
COMPILED = _register()
