"""The findings of all stages as one page, failures first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHOWN = 40  # failures listed of each stage


def write(out: Path, stages: list[str]) -> tuple[str, int]:
    """Write <out>/summary.txt; returns its text and the number of failures.

    The headline counts what did not run, too: stages that were never begun, and parts of others.
    """
    found = {name: read(out / f"{name}.json") for name in stages}
    count = sum(len(stage["failures"]) for stage in found.values() if stage)
    lines = [headline(found, count), ""]
    for kind, title in (("failures", "FAILED"), ("unrun", "NOT RUN")):
        for name, stage in found.items():
            if stage and (texts := stage.get(kind)):
                lines.append(f"{title} {name}: {len(texts)}")
                lines += [f"  {text}" for text in texts[:SHOWN]]
                if len(texts) > SHOWN:
                    lines.append(f"  and {len(texts) - SHOWN} more in {name}.json")
                lines.append("")
    for name, stage in found.items():
        if stage is None:
            lines.append(f"{name}: not run")
            continue
        lines.append(f"{name}: {stage['status']}, {stage['seconds']} s, {len(stage['rows'])} rows")
        lines += [f"  {text}" for text in stage["notes"]]
        lines += _TABLES.get(name, lambda rows: [])(stage["rows"])
    text = "\n".join(lines)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    return text, count


def headline(found: dict[str, dict[str, Any] | None], failures: int) -> str:
    """ "No failures; not run: 3 parts of tune, and all of speed"."""
    text = f"{failures} failures" if failures else "No failures"
    parts = {n: len(stage.get("unrun", ())) for n, stage in found.items() if stage}
    unrun = [f"{many} part{'s' * (many > 1)} of {n}" for n, many in parts.items() if many]
    if absent := [name for name, stage in found.items() if stage is None]:
        unrun.append("all of " + ", ".join(absent))
    return f"{text}; not run: {' and '.join(unrun)}" if unrun else f"{text}; all was run"


def read(path: Path) -> dict[str, Any] | None:
    """A stage's JSON; None where it was not run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _correctness(rows: list[dict[str, Any]]) -> list[str]:
    """The worst figure of each implementation, operator and dtype."""
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["impl"], row["operator"], row["dtype"])
        if key not in worst or row["used"] > worst[key]["used"]:
            worst[key] = row
    return [
        f"  {impl:<7}{operator:<18}{dtype:<5} at most {row['used']:.2f} of what the rule allows "
        f"({row['quantity']}, {row['family']}, {row['shape']})"
        for (impl, operator, dtype), row in worst.items()
    ]


def _speed(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if "microseconds" not in row:
            continue
        share = f"{100 * row['roofline_share']:4.0f} %" if row["roofline_share"] else "     ?"
        lines.append(
            f"  {row['operator']:<18}{row['direction']:<9}D {row['dim']:<4}{row['dtype']:<5}"
            f"{row['contender']:<16}{row['microseconds']:>10.1f} us "
            f"[{row['low']:.1f}, {row['high']:.1f}] {share} of the roofline"
        )
    return lines


def _tune(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"  {row['entry']}: {row['pinned_microseconds']:.1f} -> {row['microseconds']:.1f} us, "
        f"{row['config']}"
        for row in rows
        if row.get("microseconds") and row.get("pinned_microseconds")
    ]


def _throughput(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"  {row['network']:<14}{row['impl']:<10}{row['contender']:<24}"
        f"{row['img_per_s']:>10.0f} img/s [{row['img_per_s_low']:.0f}, {row['img_per_s_high']:.0f}]"
        for row in rows
    ]


_TABLES = {
    "correctness": _correctness,
    "fp8": _correctness,
    "speed": _speed,
    "tune": _tune,
    "throughput": _throughput,
}
