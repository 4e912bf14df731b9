"""What a run of these tests showed, as tables: of the rows that they note.

A row says `what` ran in which `dtype` on which `arch`, with how many `launches`, of them
`unchecked` for races, and `used` of what its rule allows in which `case`, or how many shipped
`kernels`. One of a
seeded `fault` says in which `kernel` it was, on which `case` it was seen, and what `found` it. One
of a `stage`, a file of tests, says in which `run` it was ("slice" or "all"), how many `tests` it
had, how many `failed`, and the `seconds` that a core worked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Table = list[list[str]]  # its first line is the head

RULE = "largest share of what the rule allows"
SHIPPED = "kernels of the launches that ship"
FAULTS = "seeded faults"
STAGES = "time"
RUNS = {"slice": "make simulate", "all": "make simulate-all"}


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """The tables of rows by their headings; none without a line."""
    made = {
        RULE: _by_arch([row for row in rows if "used" in row], ("what", "dtype"), _share, "cases"),
        SHIPPED: _by_arch([row for row in rows if "kernels" in row], ("what",), _kernels),
        FAULTS: _faults([row for row in rows if "fault" in row]),
        STAGES: _stages([row for row in rows if "stage" in row]),
    }
    return {heading: table for heading, table in made.items() if len(table) > 1}


def latest(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of all parts; of what was run again, those of the last part that has it."""
    found: dict[Any, Row] = {}
    for number, part in enumerate(parts):
        for index, row in enumerate(part):
            named = {"fault", "case", "kernels"} & row.keys()
            names = ("fault", "what", "dtype", "arch", "case")
            found[(*sorted(named), *map(row.get, names)) if named else (number, index)] = row
    return [*found.values()]


def _share(rows: list[Row]) -> str:
    return f"{max(row['used'] for row in rows):.2f}"


def _kernels(rows: list[Row]) -> str:
    return str(sum(row["kernels"] for row in rows))


def _by_arch(rows: list[Row], keys: tuple[str, ...], cell: Any, count: str = "") -> Table:
    """A line for each value of the keys, a cell for each GPU; then how many launches there were."""
    archs = sorted({row["arch"] for row in rows})
    counted = [count, "launches"] if count else ["launches"]
    heads = ["operator" if key == "what" else key for key in keys]
    table = [[*heads, *(f"sm_{arch}" for arch in archs), *counted, "not searched for races"]]
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row[key] for key in keys), []).append(row)
    for named, line in sorted(lines.items()):
        at = {arch: [row for row in line if row["arch"] == arch] for arch in archs}
        sums = [str(sum(row[name] for row in line)) for name in ("launches", "unchecked")]
        cases = [str(len(line))] if count else []
        table.append([*named, *(cell(here) if here else "" for here in at.values()), *cases, *sums])
    return table


def _faults(rows: list[Row]) -> Table:
    return [["fault", "kernel", "seen on", "found by"]] + [
        [row["fault"], row["kernel"], row["case"], row["found"]] for row in rows
    ]


def _stages(rows: list[Row]) -> Table:
    """Of parts of a run, their sums."""
    sums: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (RUNS[row["run"]], row["stage"])
        whole = sums.setdefault(key, {"tests": 0, "failed": 0, "seconds": 0.0})
        for name in whole:
            whole[name] += row[name]
    return [["run", "stage", "tests", "failed", "seconds of a core"]] + [
        [*key, str(whole["tests"]), str(whole["failed"]), f"{whole['seconds']:.0f}"]
        for key, whole in sorted(sums.items())
    ]


def total(rows: Iterable[Row]) -> str:
    """How much was run, in a line."""
    cases = [row for row in rows if "launches" in row]
    launches, unchecked = (sum(row[name] for row in cases) for name in ("launches", "unchecked"))
    return f"{len(cases)} cases, {launches} launches, {unchecked} of them not searched for races"


def aligned(table: Table) -> list[str]:
    """A table's lines for a terminal: words to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    words = [
        not any(cell[:1].isdigit() for cell in column) for column in zip(*table[1:], strict=True)
    ]
    return [
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in table
    ]


def markdown(rows: Sequence[Row]) -> str:
    """All tables, each under a line **simulated GPUs: ...**"""
    lines = []
    for heading, (head, *body) in tables(rows).items():
        lines += ["", f"**simulated GPUs: {heading}**", ""]
        lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(line)} |" for line in body]
    return "\n".join(lines)
