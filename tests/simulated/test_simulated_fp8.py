"""e4m3's kernels on the simulated GPUs: their rounding to the bit, their results by the reference.

The rule against fp64 cannot apply in 8 bits. Results are held to the reference, which quantises
alike, within what bench/qualification/fp8.py allows on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import simulator
import torch

import numerics
from deit.kernels.fp8 import triton_rows as fp8_rows
from deit.kernels.fp8.quantize import GROUP, quantize
from deit.kernels.prove import calls, oracle
from qualification.fp8 import ALLOWED

ARCHITECTURES = (89, 90, 100, 120)
DTYPES = ("bf16", "fp16", "fp32")
# DeiT's widths; then rows and groups of 128 that no tile fills.
SIZES = (calls.Size(3, 197, 192), calls.Size(2, 198, 384), calls.Size(1, 197, 768),
         calls.Size(2, 61, 80, width=130))  # fmt: skip


def _machines() -> Iterator[tuple[int, str]]:
    """GPUs and dtypes; CI's slice has all dtypes on Hopper, and bf16 elsewhere."""
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            if simulator.ASKED == "all" or arch == 90 or dtype == "bf16":
                yield arch, dtype


@pytest.mark.parametrize(("arch", "dtype"), [*_machines()])
def test_the_quantiser_rounds_as_pytorch(arch, dtype):
    x = oracle.make("outlier", (150, 300)) * torch.logspace(-3, 3, 150)[:, None]
    x = x.to(numerics.DTYPES[dtype])
    x[1] = 0.0
    x[2, 5], x[3, 200], x[4, 299] = math.nan, math.inf, -math.inf
    x[5] = 448.0 * 2.0 ** torch.randint(-9, 7, (300,))
    rows, launch = fp8_rows.plan(x, None)
    with simulator.device(arch) as launched:
        launch.run(x)
    e4m3, scales = quantize(x, GROUP)
    torch.testing.assert_close(rows.scales.T, scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rows.e4m3.float(), e4m3.float())
    assert not launched.races_unchecked


def _named(of: calls.Size | str) -> str:
    return of if isinstance(of, str) else f"{of.batch}x{of.tokens}x{of.dim}"


# CI's slice has every form where no tile is filled, and all options at D = 192 and 384.
SHAPES = [
    (size, form)
    for size in SIZES
    for form in calls.FORMS
    if simulator.ASKED == "all" or (size.dim < 768 and (form == "every") != (size is SIZES[-1]))
]


@pytest.mark.parametrize(("size", "form"), SHAPES, ids=_named)
@pytest.mark.parametrize("operator", ALLOWED)
@pytest.mark.parametrize(("arch", "dtype"), [*_machines()])
def test_results_are_the_references(arch, dtype, operator, size, form, note):
    draw = calls.Draw("random", numerics.DTYPES[dtype])
    call = calls.build(f"fp8_{operator}", draw, size, form)
    expected = call.results("reference", call.inputs)["out"].double()
    with simulator.device(arch) as launched:
        out = call.results("triton", call.inputs)["out"]
    distance = float((out.double() - expected).norm() / expected.norm())
    used = distance / (ALLOWED[operator] + torch.finfo(out.dtype).eps / 2)
    note(what=call.operator, dtype=dtype, arch=arch, case=f"{size} {form}", used=used,
         launches=launched.launches, unchecked=launched.races_unchecked)  # fmt: skip
    assert launched.launches
    assert not launched.races_unchecked
    assert used <= 1
