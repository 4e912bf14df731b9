"""Faults put into the kernels on purpose: what the simulation is worth. Each is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import simulator
from simulator import sanitize
from test_operators import FEW, LEAN, Case, Size, measure

from deit.kernels.attention import triton as attention
from deit.kernels.device import common, few_rows
from deit.kernels.layer_norm import triton as layer_norm
from deit.kernels.layer_norm import triton_bwd as layer_norm_bwd
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as linear
from deit.kernels.linear import triton_gradients as gradients
from deit.kernels.linear import triton_split as split
from deit.kernels.linear import triton_tile as linear_tile

RULE, LEANS = "above the rule", "leans"
# What a finding is in words, where the tool's own are short.
SAID = {
    "past the end": "an access out of bounds",
    "write-write": "a race: two programs write",
    "read-write": "a race: one program reads, another writes",
    "NaN": "NaN: what was never written",
    LEANS: "errors that lean to one side",
}
NORM, LINEAR = Size(3, 61, 192), Size(3, 61, 192, width=768)


@dataclass(frozen=True)
class Fault:
    """`right` of a kernel's source is `wrong`, and this call of it is found by that.

    whole: the call runs as one of many rows, whose sums are not cut into parts.
    """

    kernel: object
    right: str
    wrong: str
    case: Case
    found_by: str
    whole: bool = False


FAULTS = {
    "a store without its mask": Fault(
        layer_norm._layer_norm_kernel,
        "y.to(out.dtype.element_ty), mask=mask)", "y.to(out.dtype.element_ty))",
        Case("layer_norm", 90, "bf16", Size(1, 61, 128)), "past the end"),
    "a load without its rows' mask": Fault(
        linear_tile.product,
        "mask=(row < rows)[:, None] & k_mask", "mask=k_mask & (row >= 0)[:, None]",
        Case("linear", 80, "bf16", LINEAR, "least"), "past the end"),
    "the stride of another tensor": Fault(
        linear_tile.product,
        "col.to(tl.int64)[:, None] * weight_stride", "col.to(tl.int64)[:, None] * last",
        Case("linear", 80, "bf16", LINEAR, "least", unaligned=True), RULE),
    "a descriptor read at the wrong depth": Fault(
        linear_tile.product, "x.load([m0, k0])", "x.load([m0, 0])",
        Case("linear", 90, "bf16", LINEAR, "least"), RULE),
    "two programs write one tile": Fault(
        linear._linear_kernel,
        "n0 + part * (BLOCK_N // EPILOGUES)", "part * (BLOCK_N // EPILOGUES)",
        Case("linear", 90, "bf16", LINEAR, "least"), "write-write"),
    "two programs write one partial sum": Fault(
        layer_norm_bwd._backward_kernel,
        "at = tl.program_id(0) * dim + cols", "at = tl.program_id(0) * 0 + cols",
        Case("layer_norm", 90, "bf16", NORM), "write-write"),
    "a program reads what another writes": Fault(
        layer_norm._add_layer_norm_kernel,
        "y = normalise(values,",
        "values += tl.load(total + out_at - dim, mask=mask & (row > 0)[:, None], other=0.0)\n"
        "    y = normalise(values,",
        Case("add_layer_norm", 90, "bf16", NORM), "read-write"),
    "a tile that no program writes": Fault(
        linear._linear_kernel,
        "tl.range(tl.program_id(0), tiles", "tl.range(tl.program_id(0) + 1, tiles",
        Case("linear", 90, "bf16", LINEAR, "least"), "NaN"),
    "a read before the write": Fault(
        common.store_tile,
        "tl.store(out + at, stored, mask=mask)",
        "tl.store(out + at, stored + tl.load(out + at, mask=mask, other=0.0), mask=mask)",
        Case("linear", 80, "bf16", LINEAR, "least"), "NaN"),
    "sums in the factors' dtype": Fault(
        linear_tile.product,
        "acc = tl.dot(a, b.T, acc, input_precision=PRECISION)",
        "acc = tl.dot(a, b.T, acc, input_precision=PRECISION).to(a.dtype).to(tl.float32)",
        Case("linear", 90, "bf16", Size(1, 61, 3072, width=64), "least"), RULE, whole=True),
    "a store that cuts off": Fault(
        common.store_tile,
        "stored = tile.to(out.dtype)\n",
        "stored = tile.to(out.dtype, fp_downcast_rounding='rtz')\n",
        Case("linear", 90, "bf16", LINEAR, "least"), LEANS),
    "tf32 in place of fp32": Fault(
        linear_tile.product, "input_precision=PRECISION", "input_precision='tf32'",
        Case("linear", 90, "fp32", LINEAR, "least"), RULE),
    "statistics in bf16": Fault(
        layer_norm.normalise,
        "/ dim + eps)", "/ dim + eps).to(tl.bfloat16).to(tl.float32)",
        Case("layer_norm", 90, "fp32", NORM), RULE),
    "keys of no token": Fault(
        attention._online_kernel,
        "bias = qkv_tiles.key_bias(key_bias, batch, n0, tokens, bias_b, bias_n, BLOCK_N)",
        "bias = tl.zeros((BLOCK_N,), tl.float32)",
        Case("attention", 90, "bf16", NORM), RULE),
    "two programs write one part": Fault(
        split._parts_kernel,
        "split.to(tl.int64) * rows", "(split // 2).to(tl.int64) * rows",
        Case("linear", 90, "bf16", FEW, "least"), "write-write"),
    "a part that is not added": Fault(
        split._sum_kernel,
        "tl.static_range(1, SPLITS)", "tl.static_range(2, SPLITS)",
        Case("linear", 90, "bf16", FEW, "least"), RULE),
    "channels summed twice": Fault(
        split._parts_kernel,
        "first + split_depth, depth", "first + 2 * split_depth, depth",
        Case("linear", 90, "bf16", FEW, "least"), RULE),
    "rows summed twice": Fault(
        gradients._weight_gradient_kernel,
        "first = split * split_rows", "first = split // 2 * split_rows",
        Case("linear", 90, "bf16", Size(3, 61, 64)), RULE),
}  # fmt: skip


@pytest.fixture
def seeded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fault]:
    """The fault, in its kernel's source until the test is over."""
    fault = FAULTS[request.param]
    if fault.whole:
        monkeypatch.setattr(linear_tiles, "rows_class", lambda _: few_rows.MANY)
    source = fault.kernel.src
    assert fault.right in source, "the kernel was rewritten: seed the fault anew"
    fault.kernel._unsafe_update_src(source.replace(fault.right, fault.wrong))
    simulator.forget()
    yield fault
    fault.kernel._unsafe_update_src(source)
    simulator.forget()


@pytest.mark.parametrize("seeded", FAULTS, indirect=True)
def test_it_is_found(seeded, request, note):
    assert seeded.found_by in _finding(seeded.case)
    note(fault=request.node.callspec.params["seeded"], kernel=seeded.kernel.fn.__name__.strip("_"),
         case=str(seeded.case), found=SAID.get(seeded.found_by, seeded.found_by))  # fmt: skip


def _finding(case: Case) -> str:
    """What is said of a case; "" where nothing is wrong."""
    try:
        found = measure(case)
    except (sanitize.KernelFault, AssertionError) as error:
        return str(error)
    leans = max(map(abs, found.lean.values())) > LEAN
    return " ".join([RULE] * (max(found.used.values()) > 1) + [LEANS] * leans)


@pytest.mark.parametrize("case", dict.fromkeys(fault.case for fault in FAULTS.values()), ids=str)
def test_nothing_is_found_without_them(case):
    assert _finding(case) == ""
