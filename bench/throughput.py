"""Images/s of fused DeiTs beside the same models run by others, and beside convnets.

    python bench/throughput.py --arch deit_b --bs 256
    python bench/throughput.py --arch deit_s --bs 16 --against none --peers all --budget 0
    python bench/throughput.py --arch deit_s --latency --against none --peers all --budget 0
    python bench/throughput.py --arch deit_ti --bs 4 --neighbour --against none --peers all

What is compared runs in one process, interleaved in rounds, after its logits were checked. On a
CPU the run is fitted into a time budget and says what it shortened.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

import evidence
import peers
from deit.commands import flags
from deit.fused_vit import requests
from evidence import devices, paper_table
from race import compiling, neighbour, photos, tables
from race import contenders as field_of
from race.contenders import Network
from race.progress import Progress, process_start
from race.race import Race
from race.selection import Selection
from race.settings import Settings

CPU_BUDGET = 540.0
TABLE5_DEITS = ("deit_ti", "deit_s", "deit_b", "deit_b_384")


@dataclass(frozen=True)
class Options:
    """Measure a DeiT fused, eager and by its peers, and the convnets it competes with."""

    arch: str = "deit_b"
    """A DeiT by any of its names, or `all` for those of the paper's Table 5."""
    against: tuple[str, ...] = ()
    """Convnets of Table 5 by name, or `all`, or `none`. Not given: of each family the one nearest
    in quoted speed."""
    bs: int | None = None
    """Images in a batch; shortened, with a message, where memory or the budget demand it. Not
    given: 256, or 1 with --latency."""
    img_size: int | None = None
    """Pixels of the DeiT's images, a multiple of 16; convnets keep the paper's sizes."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. In training, the dtype of autocast."""
    impl: Literal["auto", "reference", "cpu", "triton", "cuda", "cublaslt"] = "auto"
    """Which implementation of the fused operators runs, wherever it has a kernel."""
    measure: Literal["auto", "now", "never"] | None = None
    """What fuse() measures first, outside of what is timed: `never` runs by what is stored or
    shipped. Not given: as FUSED_DEIT_MEASURE says, or auto."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto for a GPU where there is one."""
    seconds: float | None = None
    """Timed seconds for each contender. Not given: 5 on a GPU; on a CPU up to 40, as the budget
    allows."""
    budget: float | None = None
    """Seconds that the whole run may take, counted from its start; 0 for no limit. Not given:
    540 on a CPU, no limit on a GPU."""
    train: bool = False
    """Time training steps (forward, loss, backward, AdamW) instead of inference."""
    teacher: str | None = None
    """A convnet of Table 5 (`regnety_16gf`, the paper's) that labels every batch of --train: hard
    distillation."""
    protocol: Literal["modern", "deit2021"] = "modern"
    """deit2021: fp32 with TF32 off, eager, the largest batch that fits, the mean of 30 runs."""
    peers: tuple[str, ...] = ("default",)
    """What else runs the DeiTs, eager apart: `default` (torch.compile; convnets are then compiled,
    too), `all`, `none`, or names, as README.md has them (onnxruntime, jax, ...). What does not run
    here or is not installed is left out, with the reason or the command."""
    latency: bool = False
    """Single calls instead of images/s: p50 and p99 in ms."""
    neighbour: bool = False
    """Time while another process keeps one of the cores busy; on a CPU, without --json."""
    images: Path | None = None
    """A folder of photographs: report the loader, the model, and both end to end on them; with
    --train the trainer's loader, which augments by the paper's recipe."""
    json: Path | None = None
    """Write one evidence row a contender into this file."""
    threads: Annotated[int | None, flags.arg(metavar="INT")] = None
    """CPU threads. Not given: torch's choice."""


def positive(options: Options) -> None:
    """Raises ValueError for a number that is not positive."""
    for name in ("bs", "img_size", "seconds", "threads"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number; got {value}")
    if options.budget is not None and not options.budget >= 0:
        raise ValueError(f"budget: expected seconds, or 0 for no limit; got {options.budget}")


def networks(options: Options) -> list[Network]:
    """The DeiTs asked for, then the convnets; ValueError for unknown names."""
    names = TABLE5_DEITS if options.arch == "all" else (options.arch,)
    deits = [field_of.deit_network(name, options.img_size) for name in names]
    if options.arch == "all":  # with --img-size two of them may be the same
        deits = list({network.label: network for network in deits}.values())
    asked = [name for each in options.against for name in each.split(",") if name]
    if not asked:
        asked = list(dict.fromkeys(n for each in deits for n in field_of.neighbours(each)))
    elif asked == ["all"]:
        asked = list(paper_table.CONVNETS)
    elif asked == ["none"]:
        asked = []
    known = dict.fromkeys(paper_table.convnet(name).model for name in asked)
    return deits + [field_of.convnet(name) for name in known]


def settle(options: Options) -> Settings:
    """The options as terms of a race; ValueError for what cannot be had."""
    positive(options)
    device = devices.resolve(options.device)
    paper = options.protocol == "deit2021"
    if paper and options.dtype not in ("auto", "fp32"):
        raise ValueError(f"dtype: protocol deit2021 is fp32; got {options.dtype}")
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" and not paper else "fp32"
    if options.teacher and not options.train:
        raise ValueError("teacher: it labels the batches of training; add --train")
    if options.latency and (options.train or options.images or paper):
        raise ValueError("latency: for inference by the modern protocol, without --images")
    if options.neighbour and (device.type != "cpu" or paper or options.images):
        raise ValueError("neighbour: on a CPU, by the modern protocol, without --images")
    if options.neighbour:
        neighbour.core()
    if options.neighbour and options.json:  # a row does not say it
        raise ValueError("json: its rows are of a quiet machine; leave it out beside --neighbour")
    asked = [] if paper else peers.chosen(options.peers, device.type)
    reasons = {
        peer: peer.why_not(device.type, tables.DTYPES[dtype], options.train) for peer in asked
    }
    budget = options.budget
    if budget is None:
        budget = CPU_BUDGET if device.type == "cpu" else 0.0
    return Settings(
        networks=networks(options),
        batch=options.bs or (1 if options.latency else 256),
        dtype=tables.DTYPES[dtype],
        device=device,
        impl=options.impl,
        train=options.train,
        teacher=field_of.convnet(options.teacher, "teacher") if options.teacher else None,
        protocol=options.protocol,
        peers=[peer for peer, reason in reasons.items() if not reason],
        left_out=[f"{peer.name}: left out: {reason}" for peer, reason in reasons.items() if reason],
        latency=options.latency,
        neighbour=options.neighbour,
        seconds=options.seconds,
        budget=budget or None,
        keep=0.2 * budget if options.images else 0.0,
    )


def measure(
    settings: Settings, paths: Sequence[Path], progress: Progress
) -> tuple[Race, dict[str, photos.Photographs]]:
    """Everything up to the report: the race, and each DeiT's photographs by its label."""
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32; every table states it
    torch.backends.cudnn.allow_tf32 = False
    progress.left(settings.budget, at_most=True)
    race = Race(settings, progress)
    for message in settings.left_out:
        race.note(message)
    race.prepare()
    if race.entries:
        race.choose_batch()
        race.warm_up()
        Selection(race).run()
        race.final()
    found = {
        network.label: photos.measure(race, pair, paths)
        for network in settings.networks
        if paths and network.config and (pair := pair_of(race, network))
    }
    return race, found


def pair_of(race: Race, network: Network) -> list[field_of.Contender]:
    """The fused and the eager finalist of a DeiT; nothing for a convnet."""
    return [c for c in race.finalists if c.network is network and c.how in ("fused", "eager")]


def main(arguments: Sequence[str] | None = None, start: float | None = None) -> int:
    """Command line; `start` is the perf_counter() from which a budget counts, None for now.

    Exit status: 0; 1 where a contender was refused for wrong outputs; 2 for bad input, with one
    line that says what was expected.
    """
    options = flags.parse(Options, arguments, __doc__)
    with _measuring(options.measure):
        return _main(options, arguments, start)


@contextlib.contextmanager
def _measuring(how: str | None) -> Iterator[None]:
    """Within, `fuse` measures as --measure says, for every contender."""
    before = os.environ.get(requests.VARIABLE)
    if how is not None:
        os.environ[requests.VARIABLE] = how
    try:
        yield
    finally:
        os.environ.pop(requests.VARIABLE, None)
        if before is not None:
            os.environ[requests.VARIABLE] = before


def _main(options: Options, arguments: Sequence[str] | None, start: float | None) -> int:
    compiling.quiet_loggers()
    progress = Progress(time.perf_counter() if start is None else start)
    with progress:
        progress.doing("preparing")
        try:
            settings = settle(options)
            paths = photos.folder(options.images) if options.images else []
        except ValueError as error:
            progress.doing("")
            print(f"error: {error}", file=sys.stderr)
            return 2
        if options.threads:
            torch.set_num_threads(options.threads)
        race, photographs = measure(settings, paths, progress)
    if race.finalists:
        facts = devices.describe(settings.device)
        tables.show(race, facts, photographs)
        if options.json:
            evidence.write(options.json, tables.rows(race, facts, arguments, photographs))
    return 1 if race.refused or not race.finalists else 0


if __name__ == "__main__":
    sys.exit(main(start=process_start()))  # importing torch counts, too
