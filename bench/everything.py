"""The benchmarks of a device, one after another, where results are missing or stale; the page.

    python bench/everything.py --show                # what it would run
    python bench/everything.py                       # from nothing 100 minutes on two CPU cores
    python bench/everything.py --only latency table5

Each is a command of its own, which its results record and the page shows. It counts as done where
some file of results has that command's rows from this device and this torch, with today's kernels.
So an interrupted run goes on where it was. Leave the machine alone while it runs. Programs that
take photographs or a dataset of yours are not among them (throughput.py --images, distillation.py,
eight_bits_accuracy.py); the page marks their results where they are stale.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
import report
import table5
from deit.commands import flags
from evidence import devices

RACE = "python bench/throughput.py "
OPERATORS = (
    "pytest bench/operators --archs=deit_ti,deit_s,deit_b --device=auto --impl=auto --rounds=15"
)
PEERS = "compile onnxruntime openvino openvino-int8 fused-int8"


@dataclass(frozen=True)
class Job:
    """A benchmark; its results go into NAME-DEVICE.json, beside those of others so named."""

    name: str
    command: str
    minutes: float | None = None  # on two cores of an AMD EPYC; None where it was never run


def _latency(arch: str, batch: int, budget: int) -> Job:
    peers = "onnxruntime openvino" if arch == "deit_s" else "compile onnxruntime openvino"
    images = "" if batch == 1 else f"--bs {batch} "
    flags = f"--arch {arch} --latency {images}--against none --peers {peers} --budget {budget}"
    name = "latency" if batch == 1 else "latency-batches"
    return Job(name, RACE + flags, (budget + 20) / 60)


_SHARED = (Job("table5", "python bench/table5.py", 40), Job("loader", "python bench/loader.py", 1))
JOBS: dict[str, tuple[Job, ...]] = {
    "cpu": (
        Job("throughput", f"{RACE}--arch deit_b --bs 256", 9),
        *(
            Job("throughput", f"{RACE}--arch {arch} --bs 16 --against none --peers {PEERS} "
                "--budget 170", 3)
            for arch in ("deit_s", "deit_ti")
        ),
        Job("peers", f"{RACE}--arch deit_b --bs 8 --against none "
            f"--peers {PEERS.removeprefix('compile ')} --budget 240", 4),
        Job("bf16", f"{RACE}--arch deit_s --bs 16 --dtype bf16 --against none --peers compile "
            "--budget 100", 2),
        _latency("deit_ti", 1, 110),
        _latency("deit_s", 1, 100),
        *(_latency(arch, batch, 80) for arch in ("deit_ti", "deit_s") for batch in (2, 4, 8)),
        Job("train", f"{RACE}--arch deit_ti --bs 16 --train --against none --budget 110", 2),
        Job("train", f"{RACE}--arch deit_s --bs 8 --train --against none --budget 150", 3),
        Job("train", f"{RACE}--arch deit_ti --bs 16 --against none --train --teacher "
            "regnety_16gf --budget 100", 2),
        Job("operators", OPERATORS, 15),
        Job("host-cost", "python bench/host_cost.py", 1),
        Job("scaling", "python bench/scaling.py --seconds 8", 11),
        *_SHARED,
    ),
    "cuda": (
        Job("throughput", f"{RACE}--arch all --against all --peers all"),
        *(
            Job("latency", f"{RACE}--arch {arch} --latency --against none --peers all")
            for arch in ("deit_ti", "deit_s", "deit_b")
        ),
        *(
            Job("train", f"{RACE}--arch {arch} --bs 256 --train --against none")
            for arch in ("deit_ti", "deit_s", "deit_b")
        ),
        Job("train", f"{RACE}--arch deit_b --bs 256 --train --against none --teacher regnety_16gf"),
        Job("operators", OPERATORS),
        Job("scaling", "python bench/scaling.py"),
        *_SHARED,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Measure what is missing or stale on this device, then make the page."""

    only: tuple[str, ...] = ()
    """Benchmarks by name (throughput, latency, ...); not given: all."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU where there is one."""
    results: Path = evidence.RESULTS
    """The folder of results, read and completed."""
    show: bool = False
    """Say what would be run; run nothing."""


def plain(command: str) -> str:
    """A recorded command without the file that it wrote."""
    return re.sub(r" --(json|rows)[ =]\S+", "", command)


def done(job: Job, found: report.Found, facts: dict[str, Any], kind: str) -> bool:
    """Are this job's results there, from this device and torch, and with today's kernels?

    kind: the device's type, "cpu" or "cuda".
    """
    here = lambda row: all(row.get(key) == facts[key] for key in ("device", "torch"))
    if job.name == "table5":
        alike = [row for row in found.rows if "table5.py" in row["command"]]
        return not table5.missing(alike, table5.Options(device=kind), facts)
    sources = [*found.rows, *found.documents.values()]
    same = [row for row in sources if here(row) and plain(row.get("command", "")) == job.command]
    return bool(same) and not any(map(found.stale, same))


def measure(job: Job, path: Path) -> str:
    """Run a job and keep its results in `path`; "", or what went wrong."""
    program, *rest = shlex.split(job.command)
    command = [sys.executable, *(["-m", "pytest"] if program == "pytest" else []), *rest]
    if job.name == "table5":  # completes its own file
        return _wrong(subprocess.run([*command, "--json", path], cwd=evidence.ROOT).returncode)
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / path.name
        flag = "--rows" if program == "pytest" else "--json"
        ended = subprocess.run([*command, flag, fresh], cwd=evidence.ROOT).returncode
        if not fresh.exists():
            return f"no results, exit status {ended}"
        content = evidence.load(fresh)
    if isinstance(content, list):
        kept = evidence.read([path]) if path.exists() else []
        content = [row for row in kept if plain(row["command"]) != job.command] + content
    evidence.save(path, content)
    return _wrong(ended)


def _wrong(status: int) -> str:
    return f"exit status {status}" if status else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status: 0; 1 where a benchmark failed; 2 for bad input."""
    options = flags.parse(Options, arguments, __doc__)
    try:
        device = devices.resolve(options.device)
        jobs = JOBS[device.type]
        unknown = set(options.only) - {job.name for job in jobs}
        if unknown:
            names = ", ".join(dict.fromkeys(job.name for job in jobs))
            raise ValueError(f"only: expected among {names}; got {', '.join(sorted(unknown))}")
        options.results.mkdir(parents=True, exist_ok=True)
        files = list(options.results.glob("*.json"))
        found = report.load(files) if files else report.Found([], {}, {})
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = devices.describe(device)
    slug = devices.slug(facts)
    wanted = [job for job in jobs if not options.only or job.name in options.only]
    todo = [job for job in wanted if not done(job, found, facts, device.type)]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} benchmarks are done on {facts['device']}")
    failed = []
    for i, job in enumerate(todo):
        time_of_it = "" if job.minutes is None else f" (about {job.minutes:.0f} minutes)"
        head = f"[{time.strftime('%H:%M')}] {i + 1} of {len(todo)}"
        print(f"{head}: {job.command}{time_of_it}", flush=True)
        wrong = "" if options.show else measure(job, options.results / f"{job.name}-{slug}.json")
        if wrong:
            failed.append(f"{job.command}: {wrong}")
    print("\n".join(failed), file=sys.stderr, end="\n" * bool(failed))
    if options.show or not any(options.results.glob("*.json")):
        return 1 if failed else 0
    return report.main([str(path) for path in options.results.glob("*.json")]) or bool(failed)


if __name__ == "__main__":
    sys.exit(main())
