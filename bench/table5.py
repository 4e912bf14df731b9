"""Table 5 of the DeiT paper on this machine: every network, under the paper's protocol and today's.

    python bench/table5.py                        # measures what is missing or stale, prints all
    python bench/table5.py --only deit,resnet50 --protocols deit2021
    python bench/table5.py --show                 # prints what there is

Each network is a race of its own (fused, eager, compiled; of a convnet the fastest memory format),
its rows written when it is finished: a run that was interrupted goes on with the next network.
Accuracies and V100 speeds are the paper's, quoted; the images/s beside them are measured here.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.table import Column, Table

import evidence
import peers
import throughput
from deit.commands import flags
from evidence import devices, paper_table
from evidence.paper_table import Quoted
from race import compiling, planning, tables
from race import contenders as field_of
from race.contenders import Network
from race.progress import Progress, attempt

Row = dict[str, Any]
Protocol = Literal["modern", "deit2021"]

# Seconds a network on a CPU, more for each GFLOP of an image, and for what compiles long. On two
# cores a DeiT compiles in 8 s; no EfficientNet was compiled within 70 s in all.
CPU_LIMIT = {"modern": 40.0, "deit2021": 20.0}
CPU_LIMIT_PER_GFLOP = 0.25
CPU_COMPILING = {"EfficientNet": 110.0}
# Images in a batch, at most. More are slower on a CPU: EfficientNet-B0, eager, two cores, had 141
# images/s at 32 and 42 at 128, whose activations are fresh pages in every layer.
BATCH = {"cpu": 16, "cuda": 256}
# These run by 2 images. By 16 no time was left to compile B5: 3.0 images/s, and 9.6 by 2.
CPU_BY_TWO = ("efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_b8")
CPU_SECONDS = 6.0  # timed, for each contender of the modern protocol: 7 rounds and more
OVERRUN = 3.0  # times the limit after which a network is given up


@dataclass(frozen=True)
class Options:
    """Measure every network of the paper's Table 5."""

    protocols: tuple[Protocol, ...] = ("modern", "deit2021")
    """modern: bf16 on a GPU, compiled contenders too, medians of interleaved rounds. deit2021:
    fp32 with TF32 off, eager, the largest batch that fits, the mean of 30 runs."""
    only: tuple[str, ...] = ()
    """Networks by label ("deit_b↑384"), or by its beginning ("resnet"); not given: all."""
    bs: int | None = None
    """Images in a batch; on a CPU less, as memory and the limit demand, and the table says so. Not
    given: 256, on a CPU 16, and 2 of EfficientNet-B5 to B8."""
    limit: float | None = None
    """Seconds for one network and protocol; 0 for none. Not given: none on a GPU; on a CPU 40 (an
    EfficientNet 150), of deit2021 20, and 0.25 for each GFLOP of an image: 53 minutes at most."""
    peers: tuple[str, ...] = ("default",)
    """What else runs the networks under the modern protocol: as of bench/throughput.py."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto for a GPU where there is one."""
    threads: Annotated[int | None, flags.arg(metavar="INT")] = None
    """CPU threads. Not given: torch's choice."""
    json: Path | None = None
    """The rows, read and completed. Not given: bench/results/table5-DEVICE.json."""
    again: bool = False
    """Measure finished networks, too."""
    show: bool = False
    """Measure nothing."""


def chosen(only: Sequence[str]) -> list[Quoted]:
    """The rows of Table 5 to measure; ValueError for a name that no label is or begins with."""
    by_label = {paper_table.label(row): row for row in paper_table.networks()}
    names = [name for each in only for name in each.split(",") if name]
    found: set[str] = set()
    for name in names:
        meant = {name} & by_label.keys() or {each for each in by_label if each.startswith(name)}
        if not meant:
            raise ValueError(f"only: expected beginnings of {', '.join(by_label)}; got {name!r}")
        found |= meant
    return [row for each, row in by_label.items() if not names or each in found]


def finished(rows: Sequence[Row], name: str, protocol: str, facts: Row, batch: int) -> bool:
    """Is there a measurement on these terms whose kernels have not changed since?

    A batch shortened from more than `batch` to no more than it is what `batch` would have given.
    """
    same = of(rows, name, protocol)
    terms = {name: facts[name] for name in ("device", "threads", "torch")}
    return bool(same) and all(
        not evidence.is_stale(row)
        and all(row[key] == value for key, value in terms.items())
        and (row["batch_asked"] == batch or row["batch"] <= batch < row["batch_asked"])
        for row in same
    )


def of(rows: Sequence[Row], name: str, protocol: str) -> list[Row]:
    """The rows of one network under one protocol."""
    return [row for row in rows if (row["network"], row["protocol"]) == (name, protocol)]


def measure(network: Network, protocol: str, options: Options, progress: Progress) -> list[Row]:
    """The rows of one network; RuntimeError with what was noted where it gave no sound ones."""
    on_cpu = devices.resolve(options.device).type == "cpu"
    limit = limit_of(network, protocol, options)
    terms = throughput.Options(
        arch="deit_ti", against=("none",), bs=batch_of(options, network.label),
        device=options.device, protocol=protocol, budget=limit, peers=options.peers,
        seconds=CPU_SECONDS if on_cpu else None,
    )  # fmt: skip
    settings = throughput.settle(terms)
    settings = replace(
        settings, networks=[network], early=False, formats=1 if limit else 2,
        peak=peak(settings.device, settings.dtype),
    )  # fmt: skip
    with compiling.limit(OVERRUN * limit if limit else None):
        race, _ = throughput.measure(settings, [], progress)
    if race.refused or not race.finalists:
        raise RuntimeError("; ".join(race.notes) or "nothing was timed")
    if (rounds := len(race.finalists[0].samples)) < planning.LEAST_KEPT:
        raise RuntimeError(f"{rounds} rounds fitted into the limit; raise --limit")
    again = ["--only", network.label, "--protocols", protocol, "--bs", str(terms.bs)]
    again += [] if options.limit is None else ["--limit", f"{limit:g}"]
    again += [] if options.peers == ("default",) else ["--peers", *options.peers]
    facts = devices.describe(settings.device)
    return tables.rows(race, facts, again, {}, script="table5.py")


def batch_of(options: Options, name: str) -> int:
    """Images in a batch of the network with this label, before any limit."""
    kind = devices.resolve(options.device).type
    by_two = kind == "cpu" and name.startswith(CPU_BY_TWO)
    return options.bs or (2 if by_two else BATCH[kind])


def missing(rows: Sequence[Row], options: Options, facts: Row) -> list[tuple[Quoted, Protocol]]:
    """The networks and protocols that have no measurement on these terms, in the paper's order."""
    return [
        (quoted, protocol)
        for protocol in options.protocols
        for quoted in chosen(options.only)
        for name in [paper_table.label(quoted)]
        if options.again or not finished(rows, name, protocol, facts, batch_of(options, name))
    ]


def limit_of(network: Network, protocol: str, options: Options) -> float:
    """Seconds for one network under one protocol; 0 for no limit."""
    if options.limit is not None:
        return options.limit
    if devices.resolve(options.device).type != "cpu":
        return 0.0
    compiling = CPU_COMPILING.get(network.family, 0.0) * (protocol == "modern")
    return CPU_LIMIT[protocol] + compiling + CPU_LIMIT_PER_GFLOP * network.flops / 1e9


@functools.cache
def peak(device: torch.device, dtype: torch.dtype) -> devices.Peak:
    """The device's matrix product at its best: measured once a run, not for each network."""
    found = devices.Peak(device, dtype)
    found.measure(3.0)
    return found


def run(options: Options, path: Path, facts: Row) -> list[str]:
    """Measure what is missing, a file write a network; returns the labels of those that failed.

    Raises ValueError for a file of another device's rows.
    """
    rows = evidence.read([path]) if path.exists() else []
    if others := sorted({row["device"] for row in rows} - {facts["device"]}):
        raise ValueError(f"json: expected rows of {facts['device']}; got some of {others[0]}")
    jobs = missing(rows, options, facts)
    failed = []
    for i, (quoted, protocol) in enumerate(jobs):
        name = paper_table.label(quoted)
        network = field_of.quoted_network(quoted)
        work = functools.partial(measure, network, protocol, options)
        found = attempt(work, f"{i + 1} of {len(jobs)}: {name}, {protocol}")
        if found:
            rows = [row for row in rows if (row["network"], row["protocol"]) != (name, protocol)]
            rows += found
            evidence.write(path, rows)
        else:
            failed.append(f"{name} ({protocol})")
    return failed


def table(rows: Sequence[Row], networks: Sequence[Quoted], protocol: str) -> Table:
    """The paper's table with this machine's figures beside the quoted ones."""
    shown = tables.empty(
        Column(protocol, no_wrap=True),
        *("params\nM", "GFLOP"),
        *map(tables.quoted_numbers, ("top-1, %\nquoted", "V100 img/s\nquoted")),
        *("fused\nimg/s", "PyTorch\nimg/s", "by", "batch"),
    )
    for quoted in networks:
        same = of(rows, paper_table.label(quoted), protocol)
        shown.add_row(*cells(quoted, same, protocol))
    return shown


def cells(quoted: Quoted, rows: Sequence[Row], protocol: str) -> list[str]:
    """One network's line; a star for a stale figure, dashes where it was not measured."""
    top1 = " / ".join(f"{row.top1}" for row in paper_table.recipes(quoted))
    heads = [paper_table.label(quoted), f"{quoted.params_m:g}", "-", top1, f"{quoted.v100_img_s:g}"]
    if not rows:
        return [*heads, "-", "-", "-", "-"]
    speed = lambda row: row["img_per_s_mean" if protocol == "deit2021" else "img_per_s"]
    shown = lambda row: tables.number(speed(row)) + ("*" if evidence.is_stale(row) else "")
    fused = [row for row in rows if row["contender"].startswith("fused")]
    best = max((row for row in rows if row not in fused), key=speed)
    heads[2] = f"{best['gflop_per_image']:.1f}"
    heads[1] = f"{best['parameters'] / 1e6:.1f}"
    ours = shown(max(fused, key=speed)) if fused else "-"
    return [*heads, ours, shown(best), best["contender"],
            f"{best['batch']}"]  # fmt: skip


def show(rows: Sequence[Row], networks: Sequence[Quoted], protocols: Sequence[str]) -> None:
    """Print a table a protocol, and on what terms it was measured."""
    console = Console(highlight=False)
    console.width = min(120, max(100, console.width))
    for protocol in protocols:
        same = [row for row in rows if row["protocol"] == protocol]
        for line in sorted({terms(row) for row in same}):
            console.print(line, markup=False)
        console.print(table(rows, networks, protocol))
    console.print(
        f"quoted: {paper_table.SOURCE} (one V100, fp32, the largest batch); of several, "
        "in the paper's order of recipes. measured: median, of deit2021 the mean. PyTorch: the "
        "fastest of what was tried. *: the kernels have changed since; run again.",
        style="dim",
        markup=False,
    )


def terms(row: Row) -> str:
    """Where and how a row was measured, but for its batch."""
    where = row["device"] + ("" if row["driver"] else f", {row['threads']} threads")
    asked = f", batch {row['batch_asked']} asked" if row["batch"] < row["batch_asked"] else ""
    return f"{row['protocol']}: {where}, {row['dtype']}, torch {row['torch']}{asked}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status: 0; 1 where a network gave no rows; 2 for bad input."""
    options = flags.parse(Options, arguments, __doc__)
    compiling.quiet_loggers()
    try:
        networks = chosen(options.only)
        if options.bs is not None and options.bs < 1:
            raise ValueError(f"bs: expected 1 or more; got {options.bs}")
        if options.limit is not None and not 0 <= options.limit < math.inf:
            raise ValueError(f"limit: expected seconds, or 0 for none; got {options.limit}")
        device = devices.resolve(options.device)
        peers.chosen(options.peers, device.type)
        if options.threads:
            torch.set_num_threads(options.threads)
        facts = devices.describe(device)
        path = options.json or evidence.RESULTS / f"table5-{devices.slug(facts)}.json"
        failed = [] if options.show else run(options, path, facts)
        rows = evidence.read([path]) if path.exists() else []
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(rows, networks, options.protocols)
    for name in failed:
        print(f"no figures: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
