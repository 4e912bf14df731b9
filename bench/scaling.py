"""What scale costs: images/s against batch, resolution, depth, width, processes.

    python bench/scaling.py --arch deit_ti
    python bench/scaling.py --sweeps resolution nodes --gbit-between 100

All points of a sweep share its rounds, so that an exponent is fitted in every round and its
interval is that of their median. `nodes` is a paper model, not a measurement: a training step
measured here, carried to 8 to 4,096 GPUs over a stated link, with its assumptions printed.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table

import deit
import evidence
import throughput
from deit.commands import flags
from evidence import devices
from evidence.timing import median_interval
from race import compiling, planning, tables
from race import contenders as field_of
from race.contenders import Contender, Network
from race.progress import Progress, attempt
from race.race import Race
from race.settings import Settings
from studies import nodes, processes

Row = dict[str, Any]
Sweep = Literal["batch", "resolution", "depth", "width", "processes", "ddp", "nodes"]

CPU_BUDGET = 240.0  # seconds a sweep
POINTS: dict[str, tuple[int, ...]] = {
    "resolution": (224, 384, 512, 768, 1024),
    "depth": (6, 12, 24, 48),
    "width": (192, 384, 768),
}
QUANTITY = {
    "batch": "seconds a batch ~ images",
    "resolution": "seconds an image ~ side",
    "depth": "seconds an image ~ blocks",
    "width": "seconds an image ~ channels",
    "processes": "seconds an image ~ processes",
    "ddp": "seconds an image ~ processes",
}
BY_PROCESSES = ("processes", "ddp")
PROCESS_SECONDS = 10.0  # timed, of each number of processes and contender


@dataclass(frozen=True)
class Options:
    """Measure the cost of scale."""

    arch: str = "deit_ti"
    """The DeiT that is scaled."""
    sweeps: tuple[Sweep, ...] = get_args(Sweep)
    """What to vary. On a CPU alone: processes, which share the threads and one batch, and ddp, the
    same in training, gradients averaged over gloo."""
    points: tuple[int, ...] = ()
    """Values instead of the usual ones; for a single sweep."""
    bs: int = 16
    """Images in a batch, and the most of the batch sweep; less, as memory and the budget demand."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto for a GPU where there is one."""
    seconds: float | None = None
    """Timed seconds of each point and contender: as of bench/throughput.py."""
    budget: float | None = None
    """Seconds a sweep; 0 for no limit. Not given: 240 on a CPU, none on a GPU."""
    threads: Annotated[int | None, flags.arg(metavar="INT")] = None
    """CPU threads. Not given: torch's choice."""
    link: Annotated[nodes.Link, flags.arg(name="")] = field(default_factory=nodes.Link)
    """The stated link of the paper model."""
    json: Path | None = None
    """Write rows, fits and the model into this file, for bench/report.py."""


def settle(options: Options) -> Settings:
    """The terms of every sweep; ValueError for what cannot be had."""
    if options.points and (len(options.sweeps) != 1 or options.sweeps[0] == "nodes"):
        raise ValueError("points: expected with a single sweep, and not with nodes")
    if any(point < 1 for point in options.points):
        raise ValueError(f"points: expected positive numbers; got {options.points}")
    options.link.check()
    budget = options.budget
    if budget is None:
        budget = CPU_BUDGET if devices.resolve(options.device).type == "cpu" else 0.0
    terms = throughput.Options(
        arch=options.arch, against=("none",), bs=options.bs, dtype=options.dtype,
        device=options.device, budget=budget, seconds=options.seconds, peers=("none",),
    )  # fmt: skip
    return throughput.settle(terms)


def scaled(arch: str, sweep: str, value: int) -> Network:
    """The network with one of its sizes set; ValueError for a size it cannot have."""
    base = deit.config(arch)
    if sweep == "resolution":
        config = replace(base, img_size=value)
    elif sweep == "depth":
        config = replace(base, depth=value, name=f"{base.name} depth {value}")
    else:
        if value % 64:
            raise ValueError(f"points: expected widths in multiples of 64; got {value}")
        name = f"{base.name} width {value}"
        config = replace(base, embed_dim=value, num_heads=value // 64, name=name)
    build = functools.partial(deit.DeiT, config)
    return Network(config.name, "DeiT", config.img_size, config.flops, build, None, config)


# Sweeps -----------------------------------------------------------------------------------------


def run_sweep(options: Options, settings: Settings, sweep: str, progress: Progress) -> list[Row]:
    """The rows of one sweep, each with its samples; RuntimeError where a contender was refused."""
    if sweep in BY_PROCESSES:
        return _processes(options, settings, train=sweep == "ddp")
    if sweep == "batch":
        race, values = _batches(options, settings, progress)
    else:
        points = options.points or POINTS[sweep]
        by_network = {(n := scaled(options.arch, sweep, p)).label: (n, p) for p in points}
        terms = replace(settings, networks=[network for network, _ in by_network.values()])
        race, _ = throughput.measure(terms, [], progress)
        values = [by_network[c.network.label][1] for c in race.finalists]
    if race.refused:
        raise RuntimeError("; ".join(race.notes))
    if (rounds := len(race.finalists[0].samples)) < planning.LEAST_KEPT:
        raise RuntimeError(f"{rounds} rounds fitted into the budget; raise --budget")
    return [
        _row(options.arch, sweep, value, contender)
        for contender, value in zip(race.finalists, values, strict=True)
    ]


def _processes(options: Options, settings: Settings, train: bool) -> list[Row]:
    """One batch over 1, 2, 4, ... processes; RuntimeError in half precision."""
    if settings.dtype != torch.float32:
        raise RuntimeError("processes, ddp: expected fp32; leave out --dtype")
    counts = options.points or processes.points(torch.get_num_threads(), settings.batch)
    seconds = settings.seconds or PROCESS_SECONDS
    (network,) = settings.networks
    return processes.sweep(network, counts, settings.batch, seconds, train)


def _batches(options: Options, settings: Settings, progress: Progress) -> tuple[Race, list[int]]:
    """One network at every batch, all in the same rounds."""
    progress.left(settings.budget, at_most=True)
    race = Race(settings, progress)
    race.prepare()
    race.choose_batch()
    most = race.batch
    batches = options.points or tuple(1 << i for i in range(most.bit_length()))
    for entry in race.entries:
        for variant in sorted(entry.variants, key=lambda each: not each.is_fused):
            for batch in batches:
                contender = replace(variant, samples=[], tried={})
                progress.doing(f"warming up {contender.label}", f"batch {batch}")
                race.warm(contender, batch)
                race.finalists.append(contender)
    race.final()
    return race, [contender.batch for contender in race.finalists]


def _row(arch: str, sweep: str, value: int, contender: Contender) -> Row:
    speed = tables.speeds(contender)
    work = tables.gflop(contender, train=False)
    return {
        "sweep": sweep,
        "network": arch,
        "contender": contender.variant,
        "x": value,
        "batch": contender.batch,
        "n": speed.n,
        "img_per_s": speed.median,
        "img_per_s_low": speed.low,
        "img_per_s_high": speed.high,
        "gflop_per_image": work,
        "gflop_per_s": work * speed.median,
        "memory_bytes": contender.memory_bytes,
        "seconds": contender.samples,
    }


def exponents(rows: Sequence[Row], per_image: bool) -> list[float]:
    """Per round, the slope of log seconds against log x over the points of one contender.

    Raises ValueError for fewer than two points.
    """
    if len({row["x"] for row in rows}) < 2:
        raise ValueError(f"rows: expected two points or more; got {len(rows)}")
    across = [math.log(row["x"]) for row in rows]
    found = []
    for samples in zip(*(row["seconds"] for row in rows), strict=True):
        up = [
            math.log(taken / (row["batch"] if per_image else 1))
            for taken, row in zip(samples, rows, strict=True)
        ]
        found.append(statistics.linear_regression(across, up).slope)
    return found


def fits(rows: Sequence[Row], sweep: str) -> list[Row]:
    """The exponent of each contender, with its interval, and in words."""
    found = []
    for contender in dict.fromkeys(row["contender"] for row in rows):
        same = [row for row in rows if row["contender"] == contender]
        slopes = exponents(same, per_image=sweep != "batch")
        low, high = median_interval(slopes) or (None, None)
        middle = statistics.median(slopes)
        where = "" if low is None else f" (95 %: {low:.2f} to {high:.2f})"
        found.append({
            "sweep": sweep, "contender": contender, "exponent": middle, "low": low, "high": high,
            "n": len(slopes), "points": len(same),
            "text": f"{contender}: {QUANTITY[sweep]}^{middle:.2f}{where}",
        })  # fmt: skip
    return found


# The paper model --------------------------------------------------------------------------------


def measure_step(settings: Settings, progress: Progress) -> nodes.Step:
    """A training step of the fused network on this device, and the bytes of its gradients."""
    race, _ = throughput.measure(replace(settings, train=True), [], progress)
    fused = next((each for each in race.finalists if each.is_fused), None)
    if fused is None:
        raise RuntimeError("; ".join(race.notes) or "nothing was timed")
    images = torch.randn(2, 3, fused.network.img_size, fused.network.img_size)
    fused.module.zero_grad(set_to_none=True)
    field_of.training_loss(fused, images.to(settings.device), settings.dtype).backward()
    size = sum(p.grad.nbytes for p in fused.module.parameters() if p.grad is not None)
    return nodes.Step(fused.batch, statistics.median(fused.samples), size)


# Output -----------------------------------------------------------------------------------------


def listing(rows: Sequence[Row]) -> Table:
    """Rows of numbers under their names."""
    heads = [name for name in rows[0] if name not in ("seconds", "sweep", "network")]
    shown = tables.empty(*(head.replace("_", " ") for head in heads))
    for row in rows:
        cells = (row[head] for head in heads)
        shown.add_row(*(tables.number(v) if isinstance(v, (int, float)) else str(v) for v in cells))
    return shown


def measure(options: Options, settings: Settings, console: Console) -> Row:
    """Every sweep, printed as it is finished, and all of it as a document."""
    facts = devices.describe(settings.device)
    kernels = evidence.kernels(settings.device.type)  # as the sweeps begin
    rows: list[Row] = []
    found: list[Row] = []
    model: Row = {}
    for sweep in options.sweeps:
        if sweep == "nodes":
            step = attempt(functools.partial(measure_step, settings), "a training step, for nodes")
            if step is None:
                continue
            said = nodes.assumptions(step, options.link, facts["device"])
            model = {"assumptions": said, "nodes": nodes.model(step, options.link)}
            console.print(*said, listing(model["nodes"]), sep="\n", markup=False)
            continue
        work = functools.partial(run_sweep, options, settings, sweep)
        if same := attempt(work, f"{options.arch}: {sweep}"):
            rows += same
            fitted = fits(same, sweep) if len({row["x"] for row in same}) > 1 else []
            found += fitted
            console.print(listing(same), *(fit["text"] for fit in fitted), sep="\n", markup=False)
    return {
        "kind": "scaling",
        "title": f"Cost of scale: {options.arch}",
        **facts,
        "date": evidence.now(),
        **kernels,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "rows": rows,
        "fits": found,
        **model,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status: 0; 1 where a sweep failed; 2 for bad input."""
    options = flags.parse(Options, arguments, __doc__)
    compiling.quiet_loggers()
    try:
        settings = settle(options)
        for sweep in options.sweeps:
            for value in options.points if sweep in POINTS else ():
                scaled(options.arch, sweep, value)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    if settings.device.type != "cpu":  # a GPU is filled by one process
        options = replace(options, sweeps=tuple(s for s in options.sweeps if s not in BY_PROCESSES))
    console = Console(highlight=False)
    console.width = min(120, max(100, console.width))
    document = measure(options, settings, console)
    if options.json:
        command = evidence.command_line(arguments, "scaling.py")
        evidence.save(options.json, {"command": command, **document})
    done = {row["sweep"] for row in document["rows"]} | {"nodes"} & document.keys()
    return 0 if done == set(options.sweeps) else 1


if __name__ == "__main__":
    sys.exit(main())
