"""Every operator, forward and backward, beside PyTorch's best: pytest bench/operators.

What pytest-benchmark records of a case is the ratio of our seconds to those of PyTorch's best in
the same round, not the seconds: another machine, or the same one under other load, moves both, so
that `--benchmark-compare --benchmark-compare-fail=median:10%` guards the kernels and not the
weather. Seconds, bytes, FLOPs and the share of the device's measured ceiling stand in extra_info.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import deit
from deit.kernels import explain
from deit.kernels.prove import calls
from deit.kernels.prove.calls import Call, Draw, Part, Size
from evidence.timing import compare, spread
from operators import int8, measure
from operators.measure import Prepared
from operators.terms import Run
from race import checks, tables

# Relative L2 distance of outputs and gradients from eager's: what rounding explains. The test of
# accuracy is bench/numerics.py.
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class RatioClock:
    """A timer for pytest-benchmark that advances by ratios measured before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting: list[float] = []

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        """One round's ratio passes."""
        self.now += self.waiting.pop(0)


CLOCK = RatioClock()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("part", calls.parts(), ids=lambda part: part.name.replace(" ", "_"))
@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_operator(benchmark: Any, run: Run, arch: deit.Config, part: Part, direction: str) -> None:
    """One row of the report for each contender, and the ratio for pytest-benchmark."""
    backward = direction == "backward"
    sets, functions, ours = contenders(run, arch, part, backward)
    prepared = {
        name: measure.prepare(function, sets, backward) for name, function in functions.items()
    }
    agree(prepared, run.dtype)
    samples = measure.rounds(prepared, run.rounds)
    theirs = (n for n in samples if not measure.is_ours(n) and not int8.is_int8(n))
    best = min(theirs, key=lambda name: spread(samples[name]).median)
    terms = {
        "operator": part.name,
        "direction": direction,
        "arch": arch.label,
        "batch": run.batch,
        "dtype": next(name for name, dtype in tables.DTYPES.items() if dtype == run.dtype),
        "calls": part.times(arch.depth),
        "ours": best if ours == "eager" else ours,
        "best": best,
        "sets": len(sets),
    }
    rows = [terms | row for row in measured(run, sets[0], backward, samples, best, prepared)]
    run.rows += rows
    mine = next(row for row in rows if row["contender"] == terms["ours"])
    benchmark.extra_info.update(mine)
    CLOCK.waiting = [a / b for a, b in zip(samples[terms["ours"]], samples[best], strict=True)]
    benchmark.pedantic(CLOCK.advance, rounds=len(CLOCK.waiting))


def call_of(
    part: Part, arch: deit.Config, batch: int, dtype: torch.dtype, device: torch.device, number: int
) -> Call:
    """Its inputs at this network's sizes, drawn anew for each number."""
    return part.build(Draw(dtype=dtype, device=device, number=number), Size.of(arch, batch))


def contenders(
    run: Run, arch: deit.Config, part: Part, backward: bool
) -> tuple[list[Any], dict[str, measure.Function], str]:
    """Sets of inputs past the cache, who runs them, and which of those is ours.

    Skips the case where nothing of ours runs and the network's own time does not need it.
    """
    build = lambda number: call_of(part, arch, run.batch, run.dtype, run.device, number)
    first = build(1)
    if backward and not first.gradients:
        pytest.skip(f"{first.operator} is for inference")
    wanted = measure.OURS if run.impl == "auto" else (run.impl,)
    functions = measure.contenders(first, backward, wanted, compiled=run.compiled)
    if run.impl == "auto":
        given = first.leaves() if backward else first.inputs
        ours = explain(first.operator, **given, **first.options).chosen
        ours = "eager" if ours == "reference" else ours
    else:
        ours = run.impl if run.impl in functions else "eager"
    if run.impl in ("auto", "cpu"):
        functions |= int8.contenders(first, backward)
    if ours == "eager" and not part.times(arch.depth):
        pytest.skip(f"{first.operator}: nothing but PyTorch runs here")
    size = first.traffic([], backward)
    count = measure.copies(size, measure.cache_bytes(run.device))
    return [first, *(build(2 + i) for i in range(count - 1))], functions, ours


def agree(prepared: Mapping[str, Prepared], dtype: torch.dtype) -> None:
    """Refuse to time a contender that does not compute what eager does."""
    eager = prepared["eager"].results
    for name, each in prepared.items():
        expected_of = eager[:1] if name.endswith("by parts") else eager  # no row statistics
        for found, expected in zip(each.results, expected_of, strict=True):
            error = checks.distance(found, expected)
            allowed = int8.ALLOWED if int8.is_int8(name) else ALLOWED[dtype]
            if not error <= allowed:
                raise checks.WrongOutputs(f"{name} is off by {error:.1e} (relative) from eager")


def measured(
    run: Run,
    call: Any,
    backward: bool,
    samples: Mapping[str, Sequence[float]],
    best: str,
    prepared: Mapping[str, Prepared],
) -> list[dict[str, Any]]:
    """Each contender's time, the arithmetic and the bytes it stands for, and its ratio."""
    made = measure.outputs(call.function("reference")(call.inputs))
    flops, traffic = call.flops[backward], call.traffic(made, backward)
    floor = run.measured_ceilings().seconds(traffic, flops)
    rows = []
    for name, taken in samples.items():
        middle, ratio = spread(taken), compare(taken, samples[best])
        by_int8 = int8.is_int8(name)
        saved = int8.saved_bytes(call) if by_int8 else 0.0
        rows.append({
            "contender": name, "timed": prepared[name].how, "n": middle.n,
            "seconds": middle.median, "low": middle.low, "high": middle.high,
            "bytes": traffic - saved, "flops": flops,
            "share": None if by_int8 else floor / middle.median,  # the ceiling is of the dtype
            "ratio": ratio.ratio, "ratio_low": ratio.low, "ratio_high": ratio.high,
        })  # fmt: skip
    return rows
