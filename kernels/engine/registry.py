"""The operators' schemas as torch.library has them, and which implementation has a kernel of each.

A schema is defined once for every compiled implementation, in that implementation's own namespace
(`torch.ops.deit_triton.attention`, `torch.ops.deit_cpu.layer_norm`, ...), so a captured graph says
which kernel it will run, and no kernel has to be loaded to trace. What is here was put here by the
operators' own folders: each one's schema.py calls `define` when it is imported.

Registration is `torch.library.define` + `impl` rather than `custom_op`: an inference call of the
former costs about a third of the latter's host time (5.7 against 16.8 us).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import torch

NAMESPACES: dict[str, str] = {
    "cpu": "deit_cpu",
    "triton": "deit_triton",
    "cuda": "deit_cuda",
    "cublaslt": "deit_cublaslt",
}
# Implementations that have the schemas of their kernels and no others.
PRODUCTS_ALONE = ("cublaslt",)
CSRC = "csrc"  # a kernel that the library built from csrc/ registers, once it is loaded

# implementation -> the schemas it has kernels for. Where a built library lacks one that csrc/
# holds, native.py reports it; it is not left to a call to find out.
KERNELS: dict[str, frozenset[str]] = {implementation: frozenset() for implementation in NAMESPACES}
# implementation -> schema -> the module of a kernel that Python launches.
MODULES: dict[str, dict[str, str]] = {implementation: {} for implementation in NAMESPACES}
# implementation -> schema -> the callable overload; its kernels may not be loaded yet.
COMPILED: dict[str, dict[str, torch._ops.OpOverload]] = {name: {} for name in NAMESPACES}
# schema -> the shapes and dtypes of what it returns, for tracing.
FAKES: dict[str, Callable[..., object]] = {}
# schema -> `again` of Triton's kernel, which repeats a call like an earlier one past the dispatcher
# and returns None where it cannot; of those that were called before.
AGAIN: dict[str, Callable[[tuple[object, ...]], object]] = {}


def define(
    name: str,
    schema: str,
    fake: Callable[..., object],
    *,
    implementations: Sequence[str] = tuple(NAMESPACES),
    **kernels: str,
) -> None:
    """Register a schema with PyTorch, and say which kernels of it there are.

    Args:
        name: the operator's, with `_fwd` and `_bwd` those of its training. `_fwd` also returns what
            `_bwd` reads again, and `_bwd` returns the gradients in the order of the forward's
            arguments: those that `wanted`, in that order, says (None: all). A gradient or saved
            tensor that the call has no use for (not wanted, no gamma) is an empty tensor. What is
            read for one gradient alone may be None where that is not wanted.
        schema: without a name. Arguments are positional, in the order in which every
            implementation, the reference included, takes them.
        fake: makes empty tensors of the outputs' shapes and dtypes from the same arguments.
        implementations: those in whose namespaces it is defined, with a kernel or without; in one
            of PRODUCTS_ALONE only with a kernel.
        kernels: implementation -> CSRC, or the module of `deit.kernels` that has a function of
            this name: `triton="linear.triton_bwd"`. It is imported by the first call, not before.
    """
    if unknown := kernels.keys() - set(implementations):
        raise ValueError(f"{name}: expected kernels for {implementations}; got {sorted(unknown)}")
    FAKES[name] = fake
    for implementation in implementations:
        if implementation in PRODUCTS_ALONE and implementation not in kernels:
            continue
        qualified = f"{NAMESPACES[implementation]}::{name}"
        torch.library.define(qualified, schema)
        torch.library.register_fake(qualified, fake)
        place = kernels.get(implementation)
        if place is not None:
            KERNELS[implementation] |= {name}
        if place is not None and place != CSRC:
            MODULES[implementation][name] = f"deit.kernels.{place}"
            # The CPU key serves Triton's interpreter; dispatch refuses it otherwise.
            keys = ("CUDA", "CPU") if implementation == "triton" else implementation.upper()
            torch.library.impl(qualified, keys)(_launcher(implementation, name))
        namespace = getattr(torch.ops, NAMESPACES[implementation])
        COMPILED[implementation][name] = getattr(namespace, name).default


def _launcher(implementation: str, name: str) -> Callable[..., object]:
    """A stand-in that imports the kernel's module on its first call, not before."""

    @functools.cache
    def kernel() -> tuple[Callable[..., object], tuple[object, ...]]:
        found = getattr(importlib.import_module(MODULES[implementation][name]), name)
        if hasattr(found, "again"):
            AGAIN[name] = found.again
        schema = getattr(getattr(torch.ops, NAMESPACES[implementation]), name).default._schema
        return found, tuple(each.default_value for each in schema.arguments)

    def launch(*args: object) -> object:
        function, defaults = kernel()
        return function(*args, *defaults[len(args) :])  # PyTorch leaves the last ones out

    return launch
