"""What is read out of the CUDA library's machine code, and what of it is a fault."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="its cuobjdump reads machine code")

from deit.kernels.engine.native import FOLDER
from deit.kernels.prove import machine_code

PRODUCT = machine_code.Kernel(
    "sm_80",
    "void deit::product_kernel<__half, deit::Tile<2, 4, 4>, deit::Matrix<__half> >(int)",
    registers=128,
    spills=0,
    static=0,
    units=("HMMA", "LDSM", "LDGSTS"),
)


def test_what_is_a_fault():
    assert PRODUCT.faults == []
    assert PRODUCT.shared == 64 * 1024
    assert machine_code.short(PRODUCT.name) == "product_kernel<f16, Tile<2, 4, 4>, Matrix<f16> >"
    assert replace(PRODUCT, spills=8).faults == ["spills 8 bytes"]
    assert replace(PRODUCT, units=("LDSM", "LDGSTS")).faults == ["no HMMA"]
    assert "bytes of shared memory" in replace(PRODUCT, static=40000).faults[0]


def test_the_dumps_are_understood(monkeypatch):
    head = "\nFatbin elf code:\n================\narch = sm_80\ncode version = [1,8]\n"
    usage = f"{head} Function _Z1kv:\n  REG:40 STACK:0 SHARED:16 LOCAL:8\n"
    code = f"{head}\t\tFunction : _Z1kv\n        /*0000*/  HMMA.16816.F32 R4, R4, R8, R4 ;\n"
    monkeypatch.setattr(
        machine_code, "_dump", lambda option, library: code if option == "-sass" else usage
    )
    (kernel,) = machine_code.read(FOLDER)
    assert kernel == machine_code.Kernel("sm_80", "k()", 40, 8, 16, ("HMMA",))
