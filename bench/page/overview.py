"""Every device's DeiTs in one table: for the page, and in Markdown for the README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evidence import paper_table
from page import html
from page.html import Column, keyed

Row = dict[str, Any]
Stale = Callable[[Row], bool]

FP32 = ("fused", "eager", "compiled", "ONNX Runtime", "OpenVINO", "XNNPACK", "zentorch")
INT8 = ("fused int8", "OpenVINO int8")
ALWAYS = (*FP32[:5], *INT8)  # columns of the README, measured or not
START, END = "<!-- measured: `make report` writes this table -->", "<!-- /measured -->"
NAMES = {"deit_ti": "DeiT-Ti", "deit_s": "DeiT-S", "deit_b": "DeiT-B"}


def lines(rows: Sequence[Row], stale: Stale) -> list[Row]:
    """One line a device and network: contender -> its row, of the run that timed most of them.

    Inference in fp32 by the modern protocol, and what runs in 8 bits beside it. What that run did
    not time is taken from the others of that device and network; such a row has another `batch`
    or `date` than the line.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        alike = row["mode"] == "inference" and row["protocol"] == "modern" and not row["driver"]
        if alike and row["dtype"] == "fp32" and row["contender"] in (*FP32, *INT8):
            runs = found.setdefault((row["device"], row["network"]), {})
            runs.setdefault((row["date"], row["command"]), {})[row["contender"]] = row
    made = []
    for (device, network), runs in found.items():
        held = [run for run in runs.values() if "fused" in run]
        if not held:
            continue
        best = max(held, key=lambda run: (len(run), run["fused"]["n"], run["fused"]["date"]))
        rest = sorted(held, key=lambda run: (len(run), run["fused"]["batch"], run["fused"]["date"]))
        timed = {name: row for run in (*rest, best) for name, row in run.items()}
        mine = [row for name, row in timed.items() if name.startswith("fused")]
        made.append({
            "device": device, "threads": best["fused"]["threads"], "network": network,
            "batch": best["fused"]["batch"], "timed": timed, "stale": any(map(stale, mine)),
        })  # fmt: skip
    names = [paper_table.label(quoted) for quoted in paper_table.networks()]
    place = {name: number for number, name in enumerate(names)}
    devices = list(dict.fromkeys(line["device"] for line in made))
    order = lambda line: (place.get(line["network"], len(place)), devices.index(line["device"]))
    return sorted(made, key=order)


def _columns(found: Sequence[Row], always: Sequence[str]) -> list[str]:
    timed = {name for line in found for name in line["timed"]}
    return [name for name in (*FP32, *INT8) if name in timed or name in always]


def _speed(line: Row, name: str) -> float | None:
    row = line["timed"].get(name)
    return None if row is None else float(row["img_per_s"])


def table(rows: Sequence[Row], stale: Stale) -> str:
    """The page's table; "" where nothing of it was measured."""
    found = lines(rows, stale)
    if not found:
        return ""
    columns = [
        keyed("device", "device"),
        keyed("threads", "threads"),
        keyed("network", "network"),
        keyed("batch", "batch"),
    ]
    for name in _columns(found, ()):
        head = name if name in INT8 else f"{name}\nfp32"
        columns.append(Column(head, lambda line, name=name: _speed(line, name)))
        columns.append(Column("at\nbatch", lambda line, name=name: _batch(line, name)))
    columns.append(Column("state", lambda line: "stale" if line["stale"] else "as measured"))
    return html.table(_told(columns, found), found, lambda line: line["stale"])


def _told(columns: Sequence[Column], found: Sequence[Row]) -> list[Column]:
    """Without the batches' columns that say nothing."""
    return [c for c in columns if c.head != "at\nbatch" or any(c.value(line) for line in found)]


def _batch(line: Row, name: str) -> int | None:
    """The batch that a contender was timed at, where it is not the line's."""
    row = line["timed"].get(name)
    return None if row is None or row["batch"] == line["batch"] else int(row["batch"])


def markdown(rows: Sequence[Row], stale: Stale) -> str:
    """The README's table of DeiT-Ti, S and B, a line a device and network.

    The fastest in fp32 and in int8 is bold. In brackets is the batch of what was timed at another
    one. † marks what other kernels than today's were measured for.
    """
    found = [line for line in lines(rows, stale) if line["network"] in NAMES]
    names = _columns(found, ALWAYS)
    shown = [f"int8: {name.removesuffix(' int8')}" if name in INT8 else name for name in names]
    shown = ["`torch.compile`" if name == "compiled" else name for name in shown]
    text = [f"| images/s, measured on | network, quoted top-1; batch | {' | '.join(shown)} |"]
    text.append("|---" * (len(names) + 2) + "|")
    for line in found:
        quoted = next(q for q in paper_table.networks() if paper_table.label(q) == line["network"])
        label = f"{NAMES[line['network']]}, {quoted.top1} %; {line['batch']}"
        cells = [_cell(line, name, stale) for name in names]
        where = f"{line['device']}, {line['threads']} threads"
        text.append(f"| {where} | {label} | {' | '.join(cells)} |")
    return "\n".join(text)


def _cell(line: Row, name: str, stale: Stale) -> str:
    value, batch = _speed(line, name), _batch(line, name)
    if value is None:
        return "–"
    rivals = [_speed(line, each) or 0.0 for each in (INT8 if name in INT8 else FP32)]
    text = html.number(value)
    text = f"**{text}**" if value == max(rivals) else text
    old = "†" if stale(line["timed"][name]) else ""
    return f"{text}{old}" + (f" ({batch})" if batch else "")


def into(text: str, table: str) -> str:
    """A README with the table between its marks; ValueError where it has no marks."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"readme: expected a file with the lines {START} and {END}")
    return f"{before}{start}\n\n{table}\n\n{end}{after}"
