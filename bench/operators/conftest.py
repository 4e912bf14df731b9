"""Options of the operators' benchmarks, what their runs share, and the evidence they leave."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # the oracle's inputs
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import devices
import evidence
import operator_race
import tables
import torch

import deit

NAMES = ("archs", "bs", "dtype", "device", "impl", "threads", "rounds", "no_compiled")


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


@dataclass
class Run:
    """What the benchmarks of one run share."""

    archs: list[deit.Config]
    batch: int
    dtype: torch.dtype
    device: torch.device
    impl: str
    rounds: int
    compiled: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    ceilings: operator_race.Ceilings | None = None

    def measured_ceilings(self) -> operator_race.Ceilings:
        """The device's, measured when first asked for."""
        if self.ceilings is None:
            self.ceilings = operator_race.measure_ceilings(self.device, self.dtype)
        return self.ceilings

    def finish(self) -> None:
        """Measure the ceilings once more: a ceiling is the best seen, early or late in the run."""
        early, late = (
            self.measured_ceilings(),
            operator_race.measure_ceilings(self.device, self.dtype),
        )
        self.ceilings = early.best(late)
        for row in self.rows:
            row["share"] = self.ceilings.seconds(row["bytes"], row["flops"]) / row["seconds"]


def pytest_configure(config: pytest.Config) -> None:
    """Settle the terms; bad ones end the run with one line."""
    try:
        config.stash[RUN] = settle(config)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


RUN = pytest.StashKey[Run]()


def settle(config: pytest.Config) -> Run:
    """The options as terms; ValueError for what cannot be had."""
    option = config.getoption
    device = devices.resolve(option("device"))
    gpu = device.type == "cuda"
    archs = [deit.config(name) for name in option("archs").split(",")]
    batch = option("bs") if option("bs") is not None else 256 if gpu else 16
    for name, value in (("bs", batch), ("rounds", option("rounds"))):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1; got {value}")
    if option("impl") not in ("auto", *operator_race.OURS):
        known = ", ".join(("auto", *operator_race.OURS))
        raise ValueError(f"--impl: expected one of {known}; got {option('impl')!r}")
    if option("threads"):
        torch.set_num_threads(option("threads"))
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = tables.DTYPES[option("dtype") or ("bf16" if gpu else "fp32")]
    compiled = not option("no_compiled")
    return Run(archs, batch, dtype, device, option("impl"), option("rounds"), compiled)


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
    chosen = [f"--{name.replace('_', '-')}={given(name)}" for name in NAMES
              if given(name) not in (None, False)]  # fmt: skip
    evidence.save(
        path,
        {
            "kind": "operators",
            "title": "Operators",
            **devices.describe(run.device),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["pytest bench/operators", *chosen, f"--rows {path.name}"]),
            "kernels_sha256": evidence.kernels_sha256(),
            "gpu_state": devices.gpu_query(run.device, "clocks.sm,clocks.mem,power.draw"),
            "ceilings": asdict(run.measured_ceilings()),
            "rows": run.rows,
        },
    )
