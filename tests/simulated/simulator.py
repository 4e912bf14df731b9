"""A simulated GPU: Triton's launches on CPU tensors, as the compiler's IR for an architecture.

ttsem compiles each launch with Triton's own front end and executes the IR on the CPU, bf16, e4m3,
tensor descriptors and `tl.dot` included. A launch fails at the kernel's line where it reads or
writes outside its tensors, or where two programs touch one element and one of them writes it.

    with device(90) as launched:
        linear(x, weight, impl="triton")
    assert launched.launches and not launched.races_unchecked

Tensors stay the CPU's, as under Triton's interpreter. It changes Triton for the whole process, so
these tests have one of their own: `make simulate` and `make simulate-all` start it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

ASKED = os.environ.get("DEIT_SIMULATE", "")  # "slice" or "all"; anything else asks for nothing
TTSEM, TRITON = "0.1.0", "3.8."  # what it is, and what it was written for: `_mend` knows this one
ARCHITECTURES = (80, 90, 100, 120)


def why_not() -> str:
    """Why nothing can be simulated here; "" where it can."""
    if missing := [name for name in ("ttsem", "mmaemu") if not importlib.util.find_spec(name)]:
        return f"{' and '.join(missing)} not installed"
    if (found := importlib.metadata.version("ttsem")) != TTSEM:
        return f"expected ttsem {TTSEM}, whose gaps are mended here; found {found}"
    if sys.version_info < (3, 11):
        return f"ttsem needs Python 3.11; this is {sys.version.split()[0]}"
    if not (found := importlib.metadata.version("triton")).startswith(TRITON):
        return f"ttsem {TTSEM} reads the IR of triton {TRITON}*; found {found}"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET is set, which compiles nothing"
    return ""


if ASKED not in ("slice", "all"):
    pytest.skip("runs in a process of its own: make simulate", allow_module_level=True)
if reason := why_not():
    if os.environ.get("CI"):
        raise RuntimeError(f"nothing can be simulated: {reason}")
    pytest.skip(reason, allow_module_level=True)

os.environ["FUSED_DEIT_TUNED"] = "0"  # the pinned configurations, whatever was tuned here

import numpy as np  # noqa: E402
import torch  # noqa: E402
from triton._C.libtriton import ir, passes  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from ttsem import harness, memory, ops, sanitize  # noqa: E402
from ttsem._fakedriver import unstub_torch_cuda  # noqa: E402

from deit.kernels.device import common  # noqa: E402
from deit.kernels.engine import dispatch  # noqa: E402

# Element accesses of one launch that are kept to find races in; 4,000,000 as it comes.
_ACCESSES = 24_000_000


@contextlib.contextmanager
def device(arch: int = 90) -> Iterator[Any]:
    """Triton runs CPU tensors inside, as on a GPU of this architecture with three multiprocessors.

    What it yields counts `launches`, and in `races_unchecked` those too large to be searched for
    races. What torch.empty returns is NaN until it is written.
    """
    can_run, stood_for = dispatch.environment, common._INTERPRETED_ARCH
    filled = torch.are_deterministic_algorithms_enabled()
    dispatch.environment = _runs_triton(can_run)
    common._INTERPRETED_ARCH = arch
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills torch.empty, everywhere
    try:
        with sanitize.session(arch, cuda_is_cpu=False) as launched:
            yield launched
    finally:
        unstub_torch_cuda()
        torch.use_deterministic_algorithms(filled)
        dispatch.environment, common._INTERPRETED_ARCH = can_run, stood_for


@contextlib.contextmanager
def flattened() -> Iterator[None]:
    """Loops are executed flattened inside where a kernel asks for it, as on a GPU.

    Triton's pass for it runs behind the IR that is executed, so elsewhere both forms are the loops
    of the source.
    """
    make = CUDABackend.make_ttir

    def and_flatten(module: Any, *rest: Any) -> Any:
        module = make(module, *rest)
        manager = ir.pass_manager(module.context)
        passes.ttgpuir.add_fuse_nested_loops(manager)
        passes.common.add_canonicalizer(manager)
        manager.run(module, "flatten")
        return module

    CUDABackend.make_ttir = staticmethod(and_flatten)
    forget()  # what was made as a plain loop
    try:
        yield
    finally:
        CUDABackend.make_ttir = staticmethod(make)
        forget()


def _runs_triton(can_run: Any) -> Any:
    """`dispatch.environment` where Triton takes CPU tensors."""
    return lambda implementation, kind, index: (
        () if (implementation, kind) == ("triton", "cpu") else can_run(implementation, kind, index)
    )


def _mend() -> None:
    """What ttsem 0.1.0 lacks: two things of tensor descriptors. And it is spared a compilation.

    A block with leading ones ([1, 64, 64] for a [64, 64] tile) is loaded and stored in its own
    shape, where the IR has the tile's. What is written through a descriptor that the host made
    stays in the copy of its tensor. Each kernel is compiled down to machine code before it is
    compiled to the IR that is executed, at each launch: here to the IR alone, and once (`_made`).
    """
    load, store = ops.OPS["tt.descriptor_load"], ops.OPS["tt.descriptor_store"]
    write_back = sanitize._write_back

    def load_tile(interp: Any, op: Any, arguments: list[Any]) -> list[Any]:
        (block,) = load(interp, op, arguments)
        return [block.reshape(op.result_types[0].shape)]

    def store_tile(interp: Any, op: Any, arguments: list[Any]) -> list[Any]:
        where, tile, *offsets = arguments
        return store(interp, op, [where, np.asarray(tile).reshape(where.block_shape), *offsets])

    def write_all_back(record: Any, execution: Any) -> None:
        write_back(record, execution)
        for name, value in record.bound.items():
            if not harness._is_descriptor(value):
                continue
            written = np.ascontiguousarray(execution.buffer(record, name)).view(np.uint8).ravel()
            into = torch.empty(0, dtype=torch.uint8).set_(value.base.untyped_storage())
            into[: written.size].copy_(torch.from_numpy(written))

    ops.OPS["tt.descriptor_load"], ops.OPS["tt.descriptor_store"] = load_tile, store_tile
    sanitize._write_back = write_all_back
    harness._compile_asm = lambda *_: {"ttir": ""}  # not the generic form: the IR is made anew
    harness.ir_for_launch = functools.partial(_ir, harness.ir_for_launch)
    memory.ACCESS_BUDGET = _ACCESSES


_made: dict[Any, str] = {}  # by kernel, GPU and what it is specialised for


def _ir(make: Any, record: Any, stage: str, target: Any) -> str:
    special = harness._specialize(record.fn, record.args, record.kwargs, target)
    key = (record.fn, stage, str(target), str(special))
    if key not in _made:
        _made[key] = make(record, stage, target)
    return _made[key]


def executed() -> list[str]:
    """The IR of what was launched since the last `forget`, that of each kernel once."""
    return [*_made.values()]


def forget() -> None:
    """Make the IR of each kernel anew: a source was changed."""
    _made.clear()


_mend()
torch.set_num_threads(1)  # PyTorch's own error depends on it
