"""A driver that launches what it is handed in Triton's interpreter, to test kept calls."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import types
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deit.kernels.device import common, drivers, launching


class Interpreter:
    """Stands for `drivers.Driver`; `launched` counts repeated launches, `encoded` descriptors.

    stream: the current one; streams: those of the launches.
    """

    def __init__(self) -> None:
        self.device, self.launched, self.encoded = None, 0, 0
        self.stream, self.streams = 0, []

    def serves(self, tensor: Tensor) -> bool:
        return True

    def current_device(self) -> int | None:
        return self.device

    def current_stream(self, index: int | None) -> int:
        return self.stream

    def allocate(self, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    def encode(self, descriptor: TensorDescriptor, metadata: Any) -> Any:
        self.encoded += 1
        return copy.copy(descriptor), descriptor.base.data_ptr()

    def launcher(self, launch: common.Launch, compiled: Any) -> drivers.Launcher:
        names = launch.kernel.arg_names
        geometries = {
            name: geometry(value.base if isinstance(value, TensorDescriptor) else value)
            for name, value in launch.arguments.items()
        }
        empty = dataclasses.replace(launch, arguments={})  # or it would hold the tensors

        def run(stream: int, given: list[Any]) -> None:
            self.launched += 1
            self.streams.append(stream)
            values, arguments = iter(given), {}
            for name in names:
                value = next(values)
                if isinstance(value, tuple):
                    value, address = value
                    value.base = at(address, *geometries[name])
                    expanded = [next(values) for _ in range(2 * len(value.shape))]
                    assert expanded == [*value.shape, *value.strides]
                elif geometries[name] is not None:
                    value = at(value, *geometries[name])
                arguments[name] = value
            dataclasses.replace(empty, arguments=arguments)._call(empty.kernel[empty.grid])

        return run


def geometry(value: Any) -> tuple[Any, ...] | None:
    """What a tensor is beside its address."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else None


def at(address: int, shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    """The tensor of that geometry there."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    count = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


def installed(monkeypatch: Any) -> Interpreter:
    """Calls of kept operators are kept and repeated in the interpreter from here on."""
    driver = Interpreter()
    monkeypatch.setattr(drivers, "active", lambda: driver)
    compiled = types.SimpleNamespace(metadata=types.SimpleNamespace(tensordesc_meta=[{}] * 8))
    launched = launching._Watch.launched
    monkeypatch.setattr(
        launching._Watch, "launched", lambda self, launch, _: launched(self, launch, compiled)
    )
    return driver
