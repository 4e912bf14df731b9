"""Triton operators' host work where there is no GPU: CPU tensors, and launches that do nothing.

A call is planned, keyed, allocates and puts its addresses in as on a GPU
(kernels/device/launching.py). Nothing is compiled, encoded or computed, and outputs hold what
memory held.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as functional
from torch import Tensor

from deit.kernels.device import common, drivers, launching
from deit.kernels.engine import dispatch

Handed = list[tuple[Callable[..., None], int, list[Any]]]


class Stub:
    """Stands in for `drivers.Driver`."""

    serves: ClassVar[Any] = staticmethod(lambda tensor: True)
    current_device: ClassVar[Any] = staticmethod(lambda: None)
    current_stream: ClassVar[Any] = staticmethod(lambda index: 0)

    def allocate(self, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch._C._dynamo.guards._empty_strided_cpu(size, stride, dtype)

    def encode(self, descriptor: Any, metadata: Any) -> Any:
        return object()

    def launcher(self, launch: common.Launch, compiled: Any) -> Callable[..., None]:
        return lambda stream, given: None


def _attended(q: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(q)


def _multiplied(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """CPU tensors are launched by impl="triton", as Hopper's, and nothing runs."""
    stub, real = Stub(), dispatch.environment
    compiled = types.SimpleNamespace(metadata=types.SimpleNamespace(tensordesc_meta=[{}] * 8))

    def environment(implementation: str, device: str, index: int | None) -> tuple[str, ...]:
        return () if implementation == "triton" else real(implementation, device, index)

    def active() -> Stub:  # not a Mock, which would take longer than what is measured
        return stub

    def call(launch: common.Launch, kernel: Any) -> Any:
        return compiled

    with (
        mock.patch.object(drivers, "active", active),
        mock.patch.object(dispatch, "environment", environment),
        mock.patch.object(common.Launch, "_call", call),
        # Of what PyTorch computes in a forward, the last block's attention and the classifier, only
        # the outputs: on a CPU these two take 0.4 ms.
        mock.patch.object(functional, "scaled_dot_product_attention", _attended),
        mock.patch.object(functional, "linear", _multiplied),
    ):
        try:
            yield
        finally:
            launching.forget()  # what was kept would launch nothing on a GPU either


@contextlib.contextmanager
def handed(driver: Any) -> Iterator[Handed]:
    """What repeated calls of the calls that are first made inside hand to the driver, in order."""
    found: Handed = []
    real = driver.launcher

    def launcher(launch: common.Launch, compiled: Any) -> Callable[..., None] | None:
        start = real(launch, compiled)
        if start is None:
            return None

        def noted(stream: int, given: list[Any]) -> None:
            found.append((start, stream, given))
            start(stream, given)

        return noted

    with mock.patch.object(driver, "launcher", launcher):
        yield found
