"""Operators whose one kernel, of the CPU, is wrong, slow or worse: what measuring must survive.

All give 3 * x by way of a slow reference. They are known to the package only within `known`.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import dispatch, native, registry
from deit.kernels.engine.operator import OPERATORS, Operator

_calls = [0]


def _right(x: Tensor) -> Tensor:
    return x * 3


def _wrong(x: Tensor) -> Tensor:
    return x * 3.001


def _slow(x: Tensor) -> Tensor:
    time.sleep(0.004)
    return x * 3


def _raises(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available")


def _crashes(x: Tensor) -> Tensor:
    ctypes.string_at(0)
    return x * 3


def _crashes_later(x: Tensor) -> Tensor:
    _calls[0] += 1
    return _crashes(x) if _calls[0] > 12 else x * 3


def _hangs(x: Tensor) -> Tensor:
    time.sleep(600)
    return x * 3


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "right_triple": _right,
    "wrong_triple": _wrong,
    "slow_triple": _slow,
    "raising_triple": _raises,
    "crashing_triple": _crashes,
    "later_crashing_triple": _crashes_later,
    "hanging_triple": _hangs,
}


def _reference(x: Tensor) -> Tensor:
    if x.dtype != torch.float64 and not x.is_meta:
        time.sleep(0.001)  # what there is to gain
    return x + x + x


def _operator(name: str) -> Operator:
    def public(x: Tensor, *, impl: str = "auto") -> Any:
        return dispatch.run(OPERATORS[name], (x,), impl)

    public.__name__ = name
    return Operator(public, _reference)


_OPERATORS = {name: _operator(name) for name in KERNELS}


def _define() -> None:
    native.why_not("cpu")  # asked before these are there: the library has none of them
    for name, kernel in KERNELS.items():
        torch.library.define(f"deit_cpu::{name}", "(Tensor x) -> Tensor")
        torch.library.impl(f"deit_cpu::{name}", "CPU")(kernel)


@contextlib.contextmanager
def known() -> Iterator[None]:
    """Within, the package knows them."""
    before = dict(OPERATORS), dict(registry.KERNELS), dict(registry.COMPILED["cpu"])
    OPERATORS.update(_OPERATORS)
    registry.KERNELS["cpu"] |= frozenset(KERNELS)
    for name in KERNELS:
        registry.COMPILED["cpu"][name] = getattr(torch.ops.deit_cpu, name).default
    try:
        yield
    finally:
        for table, old in zip(
            (OPERATORS, registry.KERNELS, registry.COMPILED["cpu"]), before, strict=True
        ):
            table.clear()
            table.update(old)  # type: ignore[arg-type]


_define()
if "pytest" not in sys.modules:  # in the process that measures
    _kept = contextlib.ExitStack()
    _kept.enter_context(known())
