"""How the products in e4m3 are added, with an H100's own sums in the matrix unit's place.

mmaemu has the bits that an H100 (PCIe) gives for products of e4m3: it adds with some 14 bits. The
kernels therefore leave the unit after each 128 products and add these in fp32.
"""

from __future__ import annotations

import numpy as np
import pytest
import simulator
import torch

from deit.kernels.fp8.quantize import GROUP
from deit.kernels.prove import calls
from qualification.fp8 import ALLOWED

CASES = (("linear", 192), ("linear", 768), ("linear", 3072), ("gelu_mlp", 192))
# Of the exact sums, relative. An H100 gives 1.3e-4 by groups of 128, whatever the depth, and in
# one chain 1.1e-3 at a depth of 3072.
GROUPED = 2.5e-4


def _accumulate(a, b):
    """a [M, K] @ b [N, K].T as the unit adds them: one chain."""
    import mmaemu

    return mmaemu.accumulate(a, b, use_fast_accum=True, splitk=1)


@pytest.fixture
def h100(monkeypatch):
    """`tl.dot` of e4m3 is the H100's; what it yields are the depths of the products made."""
    depths, multiply = [], simulator.ops.OPS["tt.dot"]

    def dot(interp, op, arguments):
        if op.operand_types[0].scalar.name != "f8E4M3FN":
            return multiply(interp, op, arguments)
        left, right, start = (np.asarray(each) for each in arguments)
        assert not start.any()
        a, b = (
            torch.from_numpy(np.ascontiguousarray(each)).view(torch.float8_e4m3fn)
            for each in (left, right.T)
        )
        depths.append(a.shape[1])
        return [_accumulate(a, b).numpy()]

    monkeypatch.setitem(simulator.ops.OPS, "tt.dot", dot)
    return depths


@pytest.mark.parametrize(("operator", "depth"), CASES)
def test_an_h100s_sums(operator, depth, h100, note):
    """In fp32, whose rounding hides nothing."""
    call = calls.build(f"fp8_{operator}", calls.Draw(), calls.Size(1, 61, depth, width=64), "least")
    expected = call.results("reference", call.inputs)["out"]
    with simulator.device(90) as launched:
        out = call.results("triton", call.inputs)["out"]
    distance = float((out - expected).norm() / expected.norm())
    assert set(h100) == {GROUP}
    note(what=f"{call.operator}, H100", dtype="fp32", arch=90, case=str(depth),
         used=distance / ALLOWED[operator], launches=launched.launches,
         unchecked=launched.races_unchecked)  # fmt: skip
    assert distance <= (GROUPED if operator == "linear" else ALLOWED[operator])


def test_one_chain_is_why():
    """The unit left to itself at the depth of DeiT-B's fc2."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        (40 * torch.randn(64, 3072, generator=generator)).to(torch.float8_e4m3fn) for _ in range(2)
    )
    exact = a.double() @ b.double().T
    assert (_accumulate(a, b) - exact).norm() > 3 * GROUPED * exact.norm()
