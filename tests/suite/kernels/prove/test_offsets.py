"""Index arithmetic of every operator, forward and backward, on tensors of over 2**31 elements.

Read out of the Triton IR of their kernels: nothing that large is allocated.
"""

from __future__ import annotations

import dataclasses
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter has no compiler", allow_module_level=True)

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from deit.kernels.prove import aot, launches, offsets


class _Stop(Exception):
    """Carries the Triton IR out of a compilation that goes no further."""


def triton_ir(launch, monkeypatch, arch: int = 90) -> str:
    def only_triton_ir(self=None, stages=None, *_):
        def stop(module, metadata):
            raise _Stop(str(module))

        if stages is not None:
            stages["ttgir"] = stop
        return "only triton ir", "only triton ir"  # for the keys of Triton's caches

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", only_triton_ir)
    # Triton 3.6's caches, in memory and on disk, do not ask the hook.
    monkeypatch.setattr(knobs.compilation, "always_compile", True)
    launch.kernel.device_caches.clear()
    with aot.target(arch), pytest.raises(_Stop) as stopped:
        launch.compile()
    return str(stopped.value)


def first_of_each() -> list[launches.Shipped]:
    """Each variant of each operator once. fp32 brings those that have no half-precision form."""
    found = {}
    for case in launches.shipped((90,), ("bf16", "fp32")):
        found.setdefault((case.operator, case.variant), case)
    return list(found.values())


@pytest.mark.parametrize("case", first_of_each(), ids=lambda c: f"{c.operator}-{c.variant}")
def test_no_index_overflows(case, monkeypatch):
    large = dataclasses.replace(case, batch=offsets.LARGE_BATCH).build()
    ir = triton_ir(large, monkeypatch)
    reading = offsets.read(ir, large.arguments, large.grid)
    assert reading.faults(large.arguments) == []
    assert reading.reach or "tt.descriptor_load" in ir


@pytest.mark.parametrize("case", first_of_each(), ids=lambda c: f"{c.operator}-{c.variant}")
def test_the_large_launch_is_large_and_the_same_kernel(case):
    large = dataclasses.replace(case, batch=offsets.LARGE_BATCH)
    assert aot.kernel_of(large) == aot.kernel_of(case)
    tensors = [
        getattr(a, "base", a)
        for a in large.build().arguments.values()
        if isinstance(a, Tensor | TensorDescriptor)
    ]
    # One vector, or partial sums of few columns, are the exceptions.
    if case.operator != "partial_sums":
        assert max(t.numel() for t in tensors) > 2**31


@triton.jit
def _narrow_kernel(x, out, rows, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    for n in tl.range(0, width, BLOCK):
        col = n + tl.arange(0, BLOCK)
        value = tl.load(x + row * width + col, mask=col < width)  # 32 bits
        tl.store(out + row.to(tl.int64) * width + col, value, mask=col < width)


def _narrow(rows: int):
    launch = launches.Shipped("layer_norm", "plain", "bf16", 192, 90, batch=rows // 197).build()
    x = launch.arguments["x"].view(-1, 192)
    arguments = {"x": x, "out": x, "rows": x.shape[0], "width": 192, "BLOCK": 64}
    return dataclasses.replace(
        launch, kernel=_narrow_kernel, grid=(x.shape[0],), arguments=arguments
    )


def test_a_32_bit_product_is_found(monkeypatch):
    launch = _narrow(2**26)
    reading = offsets.read(triton_ir(launch, monkeypatch), launch.arguments, launch.grid)
    assert "arith.muli" in reading.overflows[0]
    assert "x is read as far as" in " ".join(reading.faults(launch.arguments))


def test_a_32_bit_product_that_fits_is_none(monkeypatch):
    launch = _narrow(2**20)
    reading = offsets.read(triton_ir(launch, monkeypatch), launch.arguments, launch.grid)
    assert reading.overflows == []
    rows = launch.grid[0]
    assert reading.reach == {"x": rows * 192 - 1, "out": rows * 192 - 1}


FRAME = """module {{
  tt.func public @k(%x: !tt.ptr<f32>, %n: i32 loc("n"), %d: i32) attributes {{noinline = false}} {{
    %c1 = arith.constant 1 : i32
    %c0 = arith.constant 0 : i32
    %pid = tt.get_program_id x : i32
    {body}
    tt.return
  }}
}}"""


def _read(body: str, **arguments: int) -> offsets.Reading:
    return offsets.read(FRAME.format(body=body), arguments, (1000,))


@pytest.mark.parametrize(
    ("operation", "n", "d", "overflows"),
    [
        ("arith.addi %n, %d", 2**31 - 2, 1, False),
        ("arith.addi %n, %d", 2**31 - 1, 1, True),
        ("arith.subi %n, %d", -(2**31), 1, True),
        ("arith.muli %pid, %d", 0, 2**21, False),
        ("arith.muli %pid, %d", 0, 2**22, True),
        ("arith.divsi %n, %d", 2**31 - 1, -1, False),
        ("arith.divsi %n, %d", -(2**31), -1, True),
        ("arith.remsi %n, %d", 2**31 - 1, 7, False),
        ("arith.minsi %n, %d", 2**31 - 1, 7, False),
        ("arith.shli %n, %d", 2**20, 11, True),
        ("arith.shrsi %n, %d", 2**31 - 1, 3, False),
        ("arith.andi %n, %d", 2**31 - 1, 7, False),
    ],
)
def test_bounds_of_one_operation(operation, n, d, overflows):
    assert bool(_read(f"%r = {operation} : i32", n=n, d=d).overflows) == overflows


def test_the_bits_of_a_float_are_any_until_they_are_masked():
    body = (
        "%v = tt.load %x : !tt.ptr<f32>\n    %b = tt.bitcast %v : f32 -> i32\n"
        "    %m = arith.andi %b, %n : i32\n    %r = arith.addi {} : i32"
    )
    assert _read(body.format("%b, %d"), n=2**30, d=1).overflows != []
    assert _read(body.format("%m, %d"), n=2**30, d=2**30 - 1).overflows == []
    assert _read(body.format("%m, %d"), n=2**30, d=2**30).overflows != []
    with pytest.raises(NotImplementedError, match="the common bits"):
        _read(body.format("%m, %d"), n=-8, d=1)


def test_a_remainder_by_subtraction_is_known_as_one():
    body = (
        "%q = arith.divsi %pid, %d : i32\n    %b = arith.muli %q, %d : i32\n"
        "    %m = arith.subi %pid, %b : i32\n    %r = arith.muli %m, %n : i32"
    )
    assert _read(body, n=2**27, d=16).overflows == []
    assert _read(body.replace("%pid, %b", "%b, %pid"), n=2**27, d=16).overflows != []


def test_an_address_moved_in_a_loop_is_followed():
    body = (
        "%e = scf.for %i = %c0 to %n step %c1 iter_args(%p = %x) -> (!tt.ptr<f32>)  : i32 {\n"
        "      %v = tt.load %p : !tt.ptr<f32>\n"
        "      %q = tt.addptr %p, %d : !tt.ptr<f32>, i32\n"
        "      scf.yield %q : !tt.ptr<f32>\n    }"
    )
    assert _read(body, n=100, d=8).reach["x"] >= 99 * 8


@pytest.mark.parametrize(
    "line", ["%r = arith.ceildivsi %n, %d : i32", "%r = tt.histogram %n : i32"]
)
def test_what_is_not_known_is_refused(line):
    with pytest.raises(NotImplementedError):
        _read(line, n=1, d=1)
