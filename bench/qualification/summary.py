"""The findings of all stages as one page, failures first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHOWN = 40  # failures listed of each stage


def write(out: Path, stages: list[str]) -> tuple[str, int]:
    """Write <out>/summary.txt; returns its text and the number of failures."""
    found = {name: read(out / f"{name}.json") for name in stages}
    count = sum(len(stage["failures"]) for stage in found.values() if stage)
    lines = [f"{count} failures" if count else "No failures", ""]
    for name, stage in found.items():
        if stage and stage["failures"]:
            lines.append(f"FAILED {name}: {len(stage['failures'])}")
            lines += [f"  {text}" for text in stage["failures"][:SHOWN]]
            if len(stage["failures"]) > SHOWN:
                lines.append(f"  and {len(stage['failures']) - SHOWN} more in {name}.json")
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
