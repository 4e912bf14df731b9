"""Shows what was simulated: the largest share of the rule by kernel, dtype and GPU.

SHARD=2/16 runs the second of sixteen parts: every sixteenth test from the second on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_ROWS: list[dict[str, Any]] = []
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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _ROWS:
        return
    terminalreporter.section("simulated: largest error, as a share of what the rule allows")
    table: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in filter(lambda row: "used" in row, _ROWS):
        cells = table.setdefault((row["what"], row["dtype"]), {})
        cells.setdefault(row["arch"], []).append(row["used"])
    archs = sorted({arch for cells in table.values() for arch in cells})
    line = "{:<22}{:<6}".format
    terminalreporter.write_line(line("", "") + "".join(f"{f'sm_{arch}':>9}" for arch in archs))
    for key, cells in sorted(table.items()):
        figures = (f"{max(cells[arch]):>9.2f}" if arch in cells else " " * 9 for arch in archs)
        terminalreporter.write_line(line(*key) + "".join(figures))
    launches = sum(row["launches"] for row in _ROWS)
    unchecked = sum(row["unchecked"] for row in _ROWS)
    terminalreporter.write_line(
        f"{len(_ROWS)} cases, {launches} launches, {unchecked} of them not searched for races"
    )
    if place := os.environ.get("DEIT_SIMULATED"):
        Path(place).write_text(json.dumps(_ROWS, indent=1))
