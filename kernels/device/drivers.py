"""Triton's own launchers of compiled kernels, without what it does in Python before them.

They are no public interface, so each version's is known here by its source: 3.6 has one C function
a signature, 3.7 and 3.8 one for all. With another version `active()` is None.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

Launcher = Callable[[int, list[Any]], None]
_VERSIONS = ("3.6", "3.7", "3.8")


class Launch(Protocol):
    """What is asked here of a `common.Launch`."""

    @property
    def kernel(self) -> Any: ...
    @property
    def grid(self) -> tuple[int, ...]: ...
    @property
    def arguments(self) -> dict[str, Any]: ...


@functools.cache
def active() -> Driver | None:
    """The driver of this process; None where it is not one that is known here."""
    if knobs.runtime.interpret or ".".join(triton.__version__.split(".")[:2]) not in _VERSIONS:
        return None
    with contextlib.suppress(ImportError, RuntimeError):
        from triton.backends.nvidia.driver import CudaDriver

        if isinstance(driver.active, CudaDriver):
            return Driver()
    return None


class Driver:
    """Triton's CUDA driver.

    serves: whether a tensor is on one of its devices. current_device: its index. current_stream:
    device index -> the stream's handle. allocate: (size, stride, dtype) -> a tensor on the current
    device, unwritten.
    """

    serves = staticmethod(operator.attrgetter("is_cuda"))

    def __init__(self) -> None:
        from triton.backends.nvidia import driver as nvidia

        self._encode = nvidia.make_tensordesc_arg
        # After the two that serve a tiled descriptor, 3.8 passes the launch's own arguments.
        self._more = (None,) * (len(inspect.signature(self._encode).parameters) - 2)
        self.current_device = driver.active.get_current_device
        self.current_stream = driver.active.get_current_stream
        self.allocate = _allocator()

    def encode(self, descriptor: TensorDescriptor, metadata: Any) -> Any:
        """The descriptor as a launcher takes it, before the shape and the strides."""
        return self._encode(descriptor, metadata, *self._more)[0]

    def launcher(self, launch: Launch, compiled: Any) -> Launcher | None:
        """(stream, arguments) -> None, as Triton itself would launch; None where that is unusual.

        The arguments are every parameter's, constants too, in order: tensors as addresses,
        descriptors encoded, followed by shape and strides. A kernel is unusual where it has scratch
        memory, which is allocated for each launch, or is instrumented.
        """
        if compiled is None or hasattr(compiled, "result"):  # not compiled, or not yet
            return None
        run = compiled.run
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        if getattr(run, "gsan_enabled", False):
            return None
        call = run.launch
        if inspect.isfunction(call):  # it encodes descriptors, then calls this
            call = inspect.getclosurevars(call).nonlocals["launcher"]
        x, y, z = (*launch.grid, 1, 1)[:3]
        how = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        # Neither scratch memory, nor hooks and what they would be told.
        scratch, hooks = (None, None), (None, None, None)
        if hasattr(run, "kernel_signature"):
            types = (run.arg_annotations, run.kernel_signature)
            rest = (*how, compiled.packed_metadata, *hooks, *scratch, *types)

            # `held`: Triton unloads a kernel that is forgotten.
            def start(stream: int, given: list[Any], held: Any = compiled) -> None:
                call(x, y, z, stream, *rest, given)

            return start
        before = (*how, *scratch, compiled.packed_metadata, *hooks)

        def start_3_6(stream: int, given: list[Any], held: Any = compiled) -> None:
            call(x, y, z, stream, *before, *given)

        return start_3_6


def _allocator() -> Callable[..., Tensor]:
    """torch.empty_strided on the current GPU.

    It is the function that TorchInductor's code calls, where torch has it: 1.0 us in place of 2.9.
    """
    plain = functools.partial(torch.empty_strided, device="cuda")
    guards = getattr(torch._C._dynamo, "guards", None)
    return getattr(guards, "_empty_strided_cuda", None) or (
        lambda size, stride, dtype: plain(size, stride, dtype=dtype)
    )
