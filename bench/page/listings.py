"""The page's tables of evidence: networks, latency, the paper's Table 5, operators, runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import evidence
from evidence import paper_table, timing
from page import html, pictures
from page.html import Column, keyed

Row = dict[str, Any]
Stale = Callable[[Row], bool]


PEAK_MB = Column("peak\nMB", lambda row: row["memory_bytes"] and row["memory_bytes"] / 1e6)


def _named(*keys: str) -> list[Column]:
    """Columns whose heads are the fields that they show."""
    return [keyed(key, key) for key in keys]


def _state(stale: Stale) -> list[Column]:
    """Whether a row still holds, and the command that makes it anew."""
    return [
        Column("state", lambda row: "stale" if stale(row) else "as measured"),
        Column("run again", lambda row: row["command"], code=True),
    ]


def models(rows: Sequence[Row], stale: Stale) -> str:
    """Evidence rows of throughput: of inference, or of training steps."""
    columns = [
        Column("network", _taught),
        *_named("contender", "protocol", "dtype", "batch"),
        Column("images/s", pictures.speed),
        keyed("first\nquartile", "img_per_s_low"),
        keyed("third\nquartile", "img_per_s_high"),
        keyed("n", "n"),
        keyed("GFLOP\nan image", "gflop_per_image"),
        keyed("GFLOP/s", "gflop_per_s"),
        Column("% of the\npeak", _of_peak),
        PEAK_MB,
        Column("params, M", lambda row: row.get("parameters") and row["parameters"] / 1e6),
        keyed("top-1, %\nquoted", "quoted_top1", quoted=True),
        Column("V100 img/s\nquoted", _v100, quoted=True),
        *_state(stale),
    ]
    return html.table(columns, rows, stale)


def _taught(row: Row) -> str:
    teacher = row.get("teacher")
    return row["network"] + (f", with {teacher}'s labels" if teacher else "")


def latencies(rows: Sequence[Row], stale: Stale) -> str:
    """Evidence rows of single calls: the middle and the tail."""
    at = lambda percent: lambda row: 1e3 * timing.percentile(row["seconds"], percent)
    columns = [
        *_named("network", "contender", "dtype", "batch"),
        Column("p50, ms", at(50)),
        Column("p99, ms", at(99)),
        Column("images/s\nat p50", pictures.speed),
        keyed("calls", "n"),
        PEAK_MB,
        *_state(stale),
    ]
    return html.table(columns, sorted(rows, key=lambda row: (row["network"], row["batch"])), stale)


def _v100(row: Row) -> str | None:
    """The quoted speed as the paper prints it."""
    quoted = row["quoted_v100_img_per_s"]
    return None if quoted is None else f"{quoted:g}"


def _of_peak(row: Row) -> float | None:
    if evidence.eight_bits(row["contender"]):  # the peak is of the run's dtype
        return None
    return float(100 * row["gflop_per_s"] / row["peak_gflop_per_s"])


def operators(document: Row) -> str:
    """Every timed operator of a document."""
    columns = [
        Column("operator", lambda row: f"{row['arch']} {row['operator']}"),
        *_named("direction", "contender"),
        Column("µs", lambda row: 1e6 * row["seconds"]),
        Column("PyTorch's best\nover this", lambda row: row["ratio"]),
        keyed("95 %\nfrom", "ratio_low"),
        keyed("to", "ratio_high"),
        Column("GB/s", lambda row: row["bytes"] / row["seconds"] / 1e9),
        Column("GFLOP/s", lambda row: row["flops"] / row["seconds"] / 1e9),
        Column("% of its\nceiling", lambda row: row["share"] and 100 * row["share"]),
        keyed("n", "n"),
        keyed("input\nsets", "sets"),
    ]
    return html.table(columns, document["rows"], lambda _: False)


def runs(results: Sequence[Row], stale: Stale) -> str:
    """Every command, when it ran, and whether its rows still hold; results name their `file`."""
    by_command: dict[tuple[str, str, str], list[Row]] = {}
    for row in results:
        key = (row["file"], row.get("command", "not recorded"), row.get("date", "not recorded"))
        by_command.setdefault(key, []).append(row)
    lines = [
        {"file": file, "command": command, "date": date, "rows": len(rows),
         "stale": any(map(stale, rows))}
        for (file, command, date), rows in by_command.items()
    ]  # fmt: skip
    columns = [
        keyed("file", "file"),
        Column("date (UTC)", lambda row: row["date"][:16].replace("T", " ")),
        keyed("rows", "rows"),
        *_state(lambda line: line["stale"]),
    ]
    return html.table(columns, lines, lambda line: line["stale"])


def paper(rows: Sequence[Row], stale: Stale) -> str:
    """The paper's Table 5, quoted, beside what was measured; "" where no network of it was.

    The rows are such as bench/table5.py measures: inference by this package or by PyTorch. The
    dtype is bf16 on a GPU, and fp32 elsewhere and by deit2021. The fastest run of a network counts.
    A line that draws on a stale row is marked.
    """
    lines = []
    for quoted in paper_table.networks():
        name = paper_table.label(quoted)
        same = [row for row in rows if row["network"] == name and _by_its_terms(row)]
        line: Row = {
            "network": name,
            "params": quoted.params_m,
            "top1": " / ".join(f"{recipe.top1}" for recipe in paper_table.recipes(quoted)),
            "v100": f"{quoted.v100_img_s:g}",
            "gflop": same[0]["gflop_per_image"] if same else None,
            "stale": any(map(stale, same)),
        }
        for protocol in PROTOCOLS:
            of_it = [row for row in same if row["protocol"] == protocol]
            for fused in (True, False):
                best = pictures.of_each_network(of_it, fused=fused)
                line[f"{protocol} {fused}"] = pictures.speed(best[0]) if best else None
        lines.append(line)
    if not any(line["gflop"] for line in lines):
        return ""
    columns = [
        keyed("network", "network"),
        keyed("params, M\nquoted", "params", quoted=True),
        keyed("GFLOP", "gflop"),
        keyed("top-1, %\nquoted", "top1", quoted=True),
        keyed("V100 img/s\nquoted", "v100", quoted=True),
    ]
    for protocol in PROTOCOLS:
        columns.append(keyed(f"{protocol}:\nfused img/s", f"{protocol} True"))
        columns.append(keyed(f"{protocol}:\nPyTorch img/s", f"{protocol} False"))
    return html.table(columns, lines, lambda line: line["stale"])


PROTOCOLS = ("modern", "deit2021")


def _by_its_terms(row: Row) -> bool:
    """Is the row such as bench/table5.py would have made it?"""
    dtype = "bf16" if row["driver"] and row["protocol"] == "modern" else "fp32"
    ways = ("fused", "eager", "compiled")
    mine = row["contender"].startswith(ways) and not evidence.eight_bits(row["contender"])
    return bool(row["mode"] == "inference" and row["dtype"] == dtype and mine)
