"""The operators' schemas and their fakes, in torch alone.

Each operator has one schema. It is defined once for every compiled implementation, in that
implementation's own namespace (`torch.ops.deit_triton.attention`, `torch.ops.deit_cpu.layer_norm`,
...), so a captured graph says which kernel it will run, and no kernel has to be loaded to trace.

Registration is `torch.library.define` + `impl` rather than `custom_op`: an inference call of the
former costs about a third of the latter's host time (5.7 against 16.8 us).

Shapes: B images, N tokens, D = H * d channels, T = B * N rows.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from deit.kernels.engine import eight_bits_schemas as eight_bits
from deit.kernels.engine.fakes import FAKES
from deit.kernels.thirds import schema as thirds

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
    "vit_block": (
        "(Tensor x, Tensor? row_stats, Tensor norm1_weight, Tensor? norm1_bias, "
        "Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, "
        "Tensor? gamma1, Tensor norm2_weight, Tensor? norm2_bias, Tensor w1, Tensor? b1, "
        "Tensor w2, Tensor? b2, Tensor? gamma2, Tensor? key_bias, int num_heads, float scale, "
        "float eps) -> (Tensor, Tensor)"
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

# What training needs beside them: `_fwd` also returns what `_bwd` reads again, and `_bwd` returns
# the gradients in the order of the forward's arguments: those that `wanted`, in that order, says
# (None: all). A gradient or saved tensor that the call has no use for (not wanted, no gamma) is an
# empty tensor. What is read for one gradient alone may be None where that is not wanted: x for
# dweight, in add_layer_norm x for dgamma; affine for dgamma, and for all of them behind an
# activation. lse, mean, rstd and a loss's statistics of its rows are fp32.
TRAINING_SCHEMAS: dict[str, str] = {
    "layer_norm_fwd": (
        "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor out, Tensor mean, "
        "Tensor rstd)"
    ),
    "layer_norm_bwd": (
        "(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool[]? wanted=None) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    "add_layer_norm_fwd": (
        "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor? gamma, "
        "Tensor? keep) -> (Tensor out, Tensor total, Tensor mean, Tensor rstd)"
    ),
    "add_layer_norm_bwd": (
        "(Tensor dout, Tensor dtotal, Tensor? x, Tensor total, Tensor weight, Tensor mean, "
        "Tensor rstd, Tensor? gamma, Tensor? keep, bool[]? wanted=None) -> (Tensor dx, "
        "Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dgamma)"
    ),
    "attention_fwd": (
        "(Tensor qkv, int num_heads, float scale, Tensor? key_bias) -> (Tensor out, Tensor lse)"
    ),
    "attention_bwd": (
        "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, float scale, "
        "Tensor? key_bias) -> Tensor dqkv"
    ),
    "linear_fwd": (
        "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, "
        "Tensor? gamma, Tensor? keep) -> (Tensor out, Tensor affine)"
    ),
    "linear_bwd": (
        "(Tensor dout, Tensor? x, Tensor weight, Tensor? affine, str? activation, Tensor? gamma, "
        "Tensor? keep, bool[]? wanted=None) -> (Tensor dx, Tensor dweight, Tensor dbias, "
        "Tensor dgamma)"
    ),
    "gelu_mlp_fwd": (
        "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, "
        "Tensor? gamma, Tensor? keep) -> (Tensor out, Tensor hidden, Tensor affine)"
    ),
    "gelu_mlp_bwd": (
        "(Tensor dout, Tensor? x, Tensor w1, Tensor w2, Tensor hidden, Tensor? affine, "
        "Tensor? gamma, Tensor? keep, bool[]? wanted=None) -> (Tensor dx, Tensor dw1, Tensor db1, "
        "Tensor dw2, Tensor db2, Tensor dgamma)"
    ),
    "patch_embed_bwd": (
        "(Tensor dout, Tensor? images, Tensor weight, int prefix_tokens, bool[]? wanted=None) "
        "-> (Tensor dweight, Tensor dbias, Tensor dprefix, Tensor dpos_embed)"
    ),
    "cross_entropy_fwd": (
        "(Tensor logits, Tensor target, float label_smoothing) -> (Tensor loss, Tensor statistics)"
    ),
    "cross_entropy_bwd": (
        "(Tensor dloss, Tensor logits, Tensor target, Tensor statistics, float label_smoothing) "
        "-> Tensor dlogits"
    ),
    "distillation_loss_fwd": (
        "(Tensor logits, Tensor target, Tensor teacher_logits, Tensor? distillation_logits, "
        "str kind, float alpha, float temperature, float label_smoothing, str kl_reduction) "
        "-> (Tensor loss, Tensor statistics)"
    ),
    "distillation_loss_bwd": (
        "(Tensor dloss, Tensor logits, Tensor target, Tensor teacher_logits, "
        "Tensor? distillation_logits, Tensor statistics, str kind, float alpha, float temperature, "
        "float label_smoothing, str kl_reduction, bool[]? wanted=None) -> (Tensor dlogits, "
        "Tensor ddistillation_logits)"
    ),
}

NAMESPACES: dict[str, str] = {"cpu": "deit_cpu", "triton": "deit_triton", "cuda": "deit_cuda"}

# Which operators each implementation has kernels for. The two native lists are what csrc/ holds;
# a built library that lacks one of them is reported by native.py, not discovered by a call.
KERNELS: dict[str, frozenset[str]] = {
    "cpu": frozenset(
        {
            "add_layer_norm",
            "add_layer_norm_bwd",
            "add_layer_norm_fwd",
            "attention",
            "attention_bwd",
            "attention_fwd",
            "gelu_mlp",
            "gelu_mlp_bwd",
            "gelu_mlp_fwd",
            "layer_norm",
            "layer_norm_bwd",
            "layer_norm_fwd",
            "linear",
            "linear_bwd",
            "linear_fwd",
            "patch_embed",
            "vit_block",
        }
    )
    | eight_bits.INT8.keys()
    | eight_bits.PACKED_SCHEMAS.keys()
    | thirds.SCHEMAS.keys(),
    "triton": frozenset(
        {
            "add_layer_norm",
            "add_layer_norm_bwd",
            "add_layer_norm_fwd",
            "attention",
            "attention_bwd",
            "attention_fwd",
            "cross_entropy",
            "cross_entropy_bwd",
            "cross_entropy_fwd",
            "distillation_loss",
            "distillation_loss_bwd",
            "distillation_loss_fwd",
            "gelu_mlp",
            "gelu_mlp_bwd",
            "gelu_mlp_fwd",
            "layer_norm",
            "layer_norm_bwd",
            "layer_norm_fwd",
            "linear",
            "linear_bwd",
            "linear_fwd",
            "patch_embed",
            "patch_embed_bwd",
            "vit_block",
        }
    )
    | eight_bits.FP8.keys(),
    "cuda": frozenset({"layer_norm", "add_layer_norm", "linear", "gelu_mlp"}),
}


def _triton_module(name: str) -> str:
    """The module of a Triton operator; gradients have their own."""
    operator = name.removesuffix("_fwd").removesuffix("_bwd")
    folder = {
        "add_layer_norm": "layer_norm",
        "cross_entropy": "losses",
        "distillation_loss": "losses",
        "fp8_linear": "fp8",
        "fp8_gelu_mlp": "fp8",
    }.get(operator, operator)
    return f"{folder}.triton_bwd" if name.endswith("_bwd") else f"{folder}.triton"


def _launcher(module: str, name: str) -> Callable[..., object]:
    """A stand-in that imports the operator's module on its first call, not before."""

    @functools.cache
    def kernel() -> Callable[..., object]:
        return getattr(importlib.import_module(f"deit.kernels.{module}"), name)

    return lambda *args: kernel()(*args)


_FAKES = FAKES | eight_bits.FAKES | thirds.FAKES
_BY_PYTHON = eight_bits.INT8.keys() | thirds.INT8.keys()  # which keeps their weights packed


def _register() -> dict[str, dict[str, torch._ops.OpOverload]]:
    compiled: dict[str, dict[str, torch._ops.OpOverload]] = {}
    for implementation, namespace in NAMESPACES.items():
        compiled[implementation] = {}
        schemas = SCHEMAS | TRAINING_SCHEMAS | eight_bits.ALL
        if implementation == "cpu":
            schemas |= thirds.SCHEMAS
        for name, schema in schemas.items():
            qualified = f"{namespace}::{name}"
            torch.library.define(qualified, schema)
            torch.library.register_fake(qualified, _FAKES[name])
            if implementation == "triton" and name in KERNELS["triton"]:
                # The CPU key serves Triton's interpreter; dispatch refuses it otherwise.
                launch = _launcher(_triton_module(name), name)
                torch.library.impl(qualified, ("CUDA", "CPU"))(launch)
            elif implementation == "cpu" and name in _BY_PYTHON:
                torch.library.impl(qualified, "CPU")(_launcher("int8.cpu", name))
            compiled[implementation][name] = getattr(getattr(torch.ops, namespace), name).default
    return compiled


# implementation -> operator -> the callable overload; its kernels may not be loaded yet.
COMPILED = _register()
