"""Shows what was simulated: the largest share of the rule by kernel, dtype and GPU, and what else.

SHARD=2/16 runs the second of sixteen parts: every sixteenth test from the second on.
DEIT_SIMULATED=FILE writes the rows that this is shown of, for docs/numerics.md's tables
(figures.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shown

_ROWS: list[shown.Row] = []
_STAGES: dict[str, shown.Row] = {}  # by the file of its tests
_HERE = Path(__file__).parent


def _shard(asked: str) -> tuple[int, int]:
    """Which part of how many; of "", the only one. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", asked or "1/1")
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise pytest.UsageError(f"SHARD: expected i/n with 1 <= i <= n, as 2/16; got {asked!r}")
    return number, of


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, of = _shard(os.environ.get("SHARD", ""))
    here = [item for item in items if _HERE in item.path.parents]
    left_out = {*here} - {*here[number - 1 :: of]}
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def note() -> Callable[..., None]:
    """Adds a row to what is shown at the end."""
    return lambda **row: _ROWS.append(row)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    name = item.path.stem
    row = {"run": os.environ.get("DEIT_SIMULATE", ""), "stage": name, "tests": 0, "failed": 0}
    stage = _STAGES.setdefault(name, {**row, "seconds": 0.0})
    began = _worked()
    result = yield
    stage["tests"] += 1
    stage["seconds"] += _worked() - began
    return result


def _worked() -> float:
    """Seconds that a core worked for this process and those that it waited for."""
    return sum(os.times()[:4])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _ROWS:
        return
    stats = terminalreporter.stats
    for report in (*stats.get("failed", ()), *stats.get("error", ())):
        _STAGES[Path(report.nodeid.split("::")[0]).stem]["failed"] += 1
    rows = [*_ROWS, *_STAGES.values()]
    for heading, table in shown.tables(rows).items():
        terminalreporter.section(f"simulated: {heading}")
        for line in shown.aligned(table):
            terminalreporter.write_line(line)
    terminalreporter.write_line(shown.total(rows))
    if place := os.environ.get("DEIT_SIMULATED"):
        Path(place).write_text(json.dumps(rows, indent=1))
