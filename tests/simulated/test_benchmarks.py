"""bench/everything.py's list for a GPU on a simulated one: each kind of job, and the page.

Networks are few and small, and clocks tick; the code is what a GPU gets. What is compiled is left
out: a compiler cannot be told that the tensors are a GPU's.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import pytest
import simulator

import deit
import everything
import loader
import report
import scaling
import table5
import throughput
from deit.commands import flags
from deit.kernels.prove import calls
from evidence import devices, paper_table
from operators import measure, terms
from race import planning, race
from race.settings import Settings

SMALL: dict[type, dict[str, Any]] = {
    throughput.Options: {"arch": "deit_ti", "against": ("none",), "bs": 2, "img_size": 32,
                         "peers": ("fused-graph",)},
    scaling.Options: {"bs": 2},
    table5.Options: {"peers": ("fused-graph",)},
    loader.Options: {"img_size": 32, "bs": 4, "rounds": 3},
}  # fmt: skip
POINTS = {"resolution": (32, 64), "depth": (1, 2), "width": (64, 128)}
NETWORKS = ("deit_ti", "resnet18")  # of Table 5
OPERATORS = ("layer_norm", "linear")
BRIEF = ("throughput", "train", "operators", "loader")  # CI's part


def _jobs() -> tuple[everything.Job, ...]:
    """The first of each name; of training also the one with a teacher."""
    found: dict[tuple[str, bool], everything.Job] = {}
    for job in everything.JOBS["cuda"]:
        teacher = "--teacher" in job.command
        if simulator.ASKED == "all" or (job.name in BRIEF and not teacher):
            found.setdefault((job.name, teacher), job)
    return tuple(found.values())


JOBS = _jobs()


@pytest.fixture
def brief(monkeypatch, tmp_path):
    """The programs of bench/, each in a few seconds, and in this process."""
    parse, plan, largest = flags.parse, planning.plan_rounds, planning.largest_that_fits
    small = SMALL | {report.Options: {"out": tmp_path / "page.html"}}
    change = monkeypatch.setattr
    smaller = lambda kind, *how: replace(parse(kind, *how), **small.get(kind, {}))
    change(flags, "parse", smaller)
    change(everything, "subprocess", types.SimpleNamespace(run=_run))
    change(everything, "JOBS", {"cuda": JOBS})
    change(scaling, "POINTS", POINTS)
    table = [row for row in paper_table.networks() if paper_table.label(row) in NETWORKS]
    change(table5, "chosen", lambda _: table)
    change(table5, "BATCH", {"cuda": 2})
    change(table5, "peak", _peak)
    change(devices.Peak, "measure", _measure_peak)
    change(devices, "gpu_query", lambda *_: "1.0")
    ticks = functools.partial(next, itertools.count())
    change(race, "time", types.SimpleNamespace(perf_counter=ticks, sleep=lambda _: None))
    change(race, "LATENCY_SECONDS", 0.005)
    change(planning, "LEAST_ROUNDS", planning.LEAST_KEPT)
    change(planning, "plan_rounds", lambda times, _, left: plan(times, 1e-3, left))
    change(planning, "largest_that_fits", lambda attempt: largest(attempt, 2))
    change(Settings, "rounds", planning.LEAST_KEPT)
    parts = [part for part in calls.parts() if part.operator in OPERATORS]
    change(calls, "parts", lambda: parts)
    change(terms, "settle", _settle(terms.settle))
    change(measure, "measure_ceilings", lambda *_: measure.Ceilings(1e12, 1e15, 1, ""))
    change(measure, "SAMPLE_SECONDS", 1e-3)  # a tick: one pass
    change(measure, "copies", lambda *_: 2)


def _run(command: list[Any], **_: Any) -> Any:
    """A program of bench/ with the arguments that it would be started with."""
    _, program, *words = map(str, command)
    if program == "-m":
        ended = int(pytest.main(["-q", "-p", "no:cacheprovider", *words[1:]]))
    else:
        ended = importlib.import_module(Path(program).stem).main(words)
    return types.SimpleNamespace(returncode=ended)


def _measure_peak(peak: devices.Peak, seconds: float = 1.0) -> float:
    peak.flops_per_s, peak.by = 1e15, "nothing"
    return peak.flops_per_s


def _peak(*of: Any) -> devices.Peak:
    found = devices.Peak(*of)
    found.measure()
    return found


def _settle(settle: Callable[..., terms.Run]) -> Callable[..., terms.Run]:
    small = {"archs": [deit.config("deit_ti", img_size=32)], "batch": 1, "compiled": False}
    return lambda option: replace(settle(option), **small, rounds=3)


def test_every_benchmark_of_a_gpu(brief, tmp_path, capsys):
    results = tmp_path / "results"
    with gpu.cuda() as launched:
        ended = everything.main(["--results", str(results)])
        printed = capsys.readouterr()
        assert ended == 0, printed.err[-4000:] + printed.out[-2000:]
        assert f"0 of {len(JOBS)} benchmarks are done on simulated sm_90" in printed.out
        assert everything.main(["--results", str(results), "--show"]) == 0
        assert f"{len(JOBS)} of {len(JOBS)} benchmarks are done" in capsys.readouterr().out
    assert launched.launches
    assert "simulated sm_90" in (tmp_path / "page.html").read_text()
