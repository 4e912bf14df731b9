"""Options of the operators' benchmarks, what their runs share, and the evidence they leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import evidence
from evidence import devices
from operators.terms import Run, settle
from race import tables

NAMES = ("archs", "bs", "dtype", "device", "impl", "threads", "rounds", "no_compiled")
RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The terms of a run."""
    group = parser.getgroup("operators", "operators of fused-deit")
    group.addoption("--archs", default="deit_ti,deit_s,deit_b", help="networks whose sizes to take")
    group.addoption("--bs", type=int, help="images; not given: 256 on a GPU, 16 on a CPU")
    group.addoption("--dtype", choices=tuple(tables.DTYPES), help="not given: bf16 on a GPU, fp32")
    group.addoption("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    group.addoption("--impl", default="auto", help="ours: auto, or an implementation by name")
    group.addoption("--threads", type=int, help="CPU threads; not given: torch's choice")
    group.addoption("--rounds", type=int, default=15, help="interleaved rounds of all contenders")
    group.addoption("--no-compiled", action="store_true", help="leave torch.compile out")
    group.addoption("--rows", type=Path, help="write the evidence into this file, for the report")


def pytest_configure(config: pytest.Config) -> None:
    """Settle the terms; bad ones end the run with one line."""
    try:
        config.stash[RUN] = settle(config.getoption)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The run; afterwards what a compilation holds is let go."""
    yield request.config.stash[RUN]
    torch._dynamo.reset()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for each network asked for."""
    if "arch" in metafunc.fixturenames:
        archs = metafunc.config.stash[RUN].archs
        metafunc.parametrize("arch", archs, ids=[config.label for config in archs])


def pytest_benchmark_scale_unit(unit: str) -> tuple[str, float]:
    """What the tables show is a ratio: "time in shares of PyTorch's"."""
    return ("shares of PyTorch'", 1.0) if unit == "seconds" else ("", 1.0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was measured, if asked to."""
    run, path = session.config.stash[RUN], session.config.getoption("rows")
    if path is None or not run.rows:
        return
    run.finish()
    given = session.config.getoption
    chosen = [
        f"--{name.replace('_', '-')}" + ("" if given(name) is True else f"={given(name)}")
        for name in NAMES
        if given(name) not in (None, False)
    ]
    evidence.save(
        path,
        {
            "kind": "operators",
            "title": "Operators",
            **devices.describe(run.device),
            "date": evidence.now(),
            "command": " ".join(["pytest bench/operators", *chosen, f"--rows {path.name}"]),
            **run.kernels,
            "gpu_state": devices.gpu_query(run.device, "clocks.sm,clocks.mem,power.draw"),
            "ceilings": asdict(run.measured_ceilings()),
            "rows": run.rows,
        },
    )
