"""torch.cuda on the simulated GPU, for programs that are written for one: what they ask it.

Tensors lie on the CPU and say `cuda`. Streams are one, events tick at each record, and a CUDA
graph is the operations and launches that it saw, which a replay makes again. The CUDA library's
kernels are not there: nothing simulates them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import simulator
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from deit.kernels.device import common
from deit.kernels.engine import native

_NAME = "simulated sm_90"
_Made = torch.Generator


class _Generator:
    """Whatever the device, one of the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _Made("cpu")


class _Event:
    """A clock that ticks: a millisecond a record."""

    ticks = itertools.count()

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0

    def record(self, *_: Any) -> None:
        self.at = next(self.ticks)

    def elapsed_time(self, other: _Event) -> float:
        return float(other.at - self.at)

    def synchronize(self) -> None: ...

    def wait(self, *_: Any) -> None: ...


class _Stream(contextlib.nullcontext[Any]):
    """The one stream there is."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def synchronize(self) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def is_capturing(self) -> bool:
        return False


class _Recorder(TorchDispatchMode):
    """Notes PyTorch's operations in `steps`, and says whether one of them is running."""

    def __init__(self, steps: list[Callable[[], object]]) -> None:
        super().__init__()
        self.steps, self.inside = steps, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.inside = True
        try:
            made = func(*args, **(kwargs or {}))
        finally:
            self.inside = False
        self.steps.append(functools.partial(_again, func, args, kwargs or {}, made))
        return made


def _again(func: Any, args: Any, kwargs: Any, made: Any) -> None:
    """The operation on what its tensors hold now, into the tensors that it made at first."""
    fresh = tree_leaves(func(*args, **kwargs))
    for kept, new in zip(tree_leaves(made), fresh, strict=True):
        if isinstance(kept, Tensor) and _memory(kept) != _memory(new):  # of a view it is the same
            kept.copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Graph:
    """The operations and launches of a capture."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[Callable[[], object]] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        run, recorder = JITFunction.run, _Recorder(self.steps)

        def noted(kernel: Any, *arguments: Any, **options: Any) -> Any:
            if not recorder.inside:
                self.steps.append(functools.partial(run, kernel, *arguments, **options))
            return run(kernel, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch, recorder:
            patch.setattr(JITFunction, "run", noted)
            yield

    def replay(self) -> None:
        with torch.no_grad():
            for step in self.steps:
                step()


def _properties(_: Any = None) -> Any:
    return types.SimpleNamespace(
        name=_NAME, major=9, minor=0, multi_processor_count=common._INTERPRETED_SMS,
        total_memory=1 << 34, L2_cache_size=1 << 16, warp_size=32,
    )  # fmt: skip


@contextlib.contextmanager
def cuda() -> Iterator[Any]:
    """Inside, there is a GPU "cuda:0" of compute capability 9.0; yields what counts launches."""
    with (
        contextlib.ExitStack() as afterwards,
        pytest.MonkeyPatch.context() as patch,
        simulator.sanitize.session(90) as launched,
    ):
        afterwards.callback(simulator.unstub_torch_cuda)
        patch.setattr(torch, "Generator", _Generator)
        for name, stand_in in {
            "Event": _Event,
            "Stream": _Stream,
            "CUDAGraph": _Graph,
            "graph": lambda graph, *_, **__: graph.capture(),
            "stream": lambda stream: stream,
            "current_stream": lambda *_: _Stream(),
            "default_stream": lambda *_: _Stream(),
            "get_device_properties": _properties,
            "get_device_name": lambda *_: _NAME,
            "mem_get_info": lambda *_: (1 << 30, 1 << 34),
            "is_current_stream_capturing": lambda: False,
            "reset_peak_memory_stats": lambda *_: None,
            "max_memory_allocated": lambda *_: 0,
            "memory_allocated": lambda *_: 0,
            "memory_reserved": lambda *_: 0,
            "memory_snapshot": lambda *_: [],
            "_sleep": lambda _: None,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.accelerator, "current_stream", lambda *_: _Stream())  # AdamW asks it
        why_not = native.why_not
        patch.setattr(
            native, "why_not", lambda k: why_not(k) if k == "cpu" else ("it is not simulated",)
        )
        for asked in (common._architecture, common._multiprocessors):
            asked.cache_clear()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield launched
        finally:
            torch.use_deterministic_algorithms(False)
            for asked in (common._architecture, common._multiprocessors):
                asked.cache_clear()
