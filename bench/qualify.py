"""Qualifies this checkout on a GPU: is every kernel right, robust, and how fast is it?

    python bench/qualify.py --out qualification          # or: make gpu OUT=qualification
    python bench/qualify.py --out qualification --only right   # then robust, then fast: 9 min each
    python bench/qualify.py --out qualification --only correctness,speed --minutes 20

Runs from a plain checkout with torch, triton and numpy; nothing is installed or downloaded. Each
stage is a process of its own with a time limit, and a stage that crashes or runs out of time
costs nothing but itself. What a stage found is <out>/<stage>.json; a finished stage is not run
again unless the sources have changed or --again is given. <out>/summary.txt says it all, failures
first. Exit status: 0; 1 where anything failed; 2 for bad input.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qualification import checkout, summary
from qualification.context import Context, Poisoned, ending, read_partial, tail

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """seconds: what it needs to run all of its parts on a GPU nothing is compiled for yet, with 16
    cores; where there is another limit, it and the stages after it share what is left in these
    proportions."""

    name: str
    module: str
    seconds: float
    what: str


STAGES = (
    Stage("environment", "environment", 15, "device, driver, versions"),
    Stage("build", "environment", 90, "the CPU and CUDA libraries of csrc/"),
    Stage("correctness", "correctness", 400, "every operator against fp64, forward and backward"),
    Stage("fp8", "fp8", 45, "products in e4m3 against their reference"),
    Stage("robustness", "robustness", 250, "same bits, strides, streams, graphs, 64-bit offsets"),
    Stage("sanitizer", "robustness", 220, "compute-sanitizer memcheck"),
    Stage("tune", "tuning", 120, "configurations of the Triton kernels for this GPU"),
    Stage("speed", "speed", 170, "every operator beside PyTorch and the roofline"),
    Stage("throughput", "models", 170, "whole networks, images a second"),
)
# Calls of nine minutes, each of which says something whole by itself on a machine of its own.
CALLS = {
    "right": ("environment", "build", "correctness", "fp8"),
    "robust": ("environment", "build", "robustness", "sanitizer"),
    "fast": ("environment", "build", "tune", "speed", "throughput"),
}
MARGIN = 0.9  # of its limit after which a stage starts nothing new; at the limit it is killed


def stages_of(only: str) -> list[Stage]:
    """Those that --only names; all where it names none. Raises ValueError for an unknown name."""
    given = [name for name in only.split(",") if name]
    asked = [stage for name in given for stage in CALLS.get(name, (name,))]
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(
            f"--only: expected stages among {', '.join(known)}; got {', '.join(unknown)}"
        )
    return [stage for stage in STAGES if not asked or stage.name in asked]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(stage.name for stage in STAGES)
    calls = "; ".join(f"{name}: {', '.join(stages)}" for name, stages in CALLS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=f"Stages: {names}. Several at once: {calls}"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--only", default="", help="stages, or right, robust, fast; by commas")
    parser.add_argument("--again", action="store_true", help="also run stages that are finished")
    parser.add_argument("--minutes", type=float, help="for everything; default: what it needs")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: does it work?")
    # How the parent starts a stage, and a stage one of its jobs.
    for hidden in ("--run-stage", "--job", "--command"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.stages = stages_of(options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.minutes is None:
        options.minutes = sum(stage.seconds for stage in options.stages) / 60
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes: expected a positive number; got {options.minutes}")
    return options


def run_inside(options: argparse.Namespace) -> int:
    """A stage's (or job's) own process: 0, or 1 where it found failures."""
    checkout.importable()
    stage = next(stage for stage in STAGES if stage.name == options.run_stage)
    jobs = 1 if options.dry_run else max(1, min(12, 3 * (os.cpu_count() or 2) // 4))
    context = Context(
        stage.name,
        options.out,
        options.command,
        options.dry_run,
        time.monotonic() + options.seconds,
        options.job,
        jobs,
    )
    module = importlib.import_module(f"qualification.{stage.module}")
    try:
        getattr(module, stage.name)(context)
    except Poisoned as error:
        context.note(f"stopped after {error}: the process's CUDA context is lost")
    if not options.job:
        save(options.out, stage.name, "finished", vars(context))
    return 1 if context.failures else 0


def save(out: Path, name: str, status: str, found: dict[str, Any], seconds: float = 0.0) -> None:
    """Write a stage's JSON by a rename: a killed write leaves the old file or none."""
    import evidence

    document = {
        "stage": name,
        "status": status,
        "seconds": round(seconds, 1),
        "kernels_sha256": evidence.kernels_sha256(),
        **{kind: found.get(kind, []) for kind in ("failures", "unrun", "notes", "rows")},
    }
    evidence.save(out / f"{name}.json", document)


def run_stage(options: argparse.Namespace, stage: Stage, limit: float, command: str) -> None:
    """Start the stage, wait no longer than `limit` seconds, and see to it that its JSON exists."""
    path, log = options.out / f"{stage.name}.json", options.out / f"{stage.name}.log"
    partial = Context(stage.name, options.out, command, options.dry_run, 0.0).partial
    for old in (path, *kept(partial)):
        old.unlink(missing_ok=True)
    arguments = [sys.executable, str(HERE / "qualify.py"), "--out", str(options.out)]
    arguments += ["--run-stage", stage.name, "--seconds", f"{MARGIN * limit:.1f}"]
    arguments += ["--command", command] + (["--dry-run"] if options.dry_run else [])
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            arguments,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(options),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    seconds = time.monotonic() - start
    if path.is_file():  # it came to its end
        save(options.out, stage.name, "finished", json.loads(path.read_text()), seconds)
        return
    found = read_partial(*kept(partial))
    why = "stopped at its limit" if code is None else f"crashed ({ending(code)})"
    found["failures"].append(f"the stage {why} after {seconds:.0f} s: {tail(log)}")
    save(options.out, stage.name, why, found, seconds)


def kept(partial: Path) -> list[Path]:
    """The findings so far of a stage and of its jobs."""
    return sorted(partial.parent.glob(f"{partial.stem}*.jsonl"))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the stage's process and the jobs it started, which share its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The stages' environment: tuned configurations are kept in `out`, not in the user's cache."""
    found = {**os.environ, "XDG_CACHE_HOME": str((options.out / "cache").resolve())}
    found["PYTHONUNBUFFERED"] = "1"
    if options.dry_run:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


def finished(out: Path, stage: Stage) -> bool:
    """Whether the stage has run all of its parts before, on the sources as they are."""
    import evidence

    try:
        document = json.loads((out / f"{stage.name}.json").read_text(encoding="utf-8"))
        return bool(
            document["status"] == "finished"
            and not document["unrun"]
            and document["kernels_sha256"] == evidence.kernels_sha256()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.run_stage:
        return run_inside(options)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = "python bench/qualify.py " + " ".join(a.rpartition("/")[2] for a in given)
    end = time.monotonic() + 60 * options.minutes
    for number, stage in enumerate(options.stages):
        if not options.again and finished(options.out, stage):
            print(f"{stage.name}: finished before (--again runs it once more)", flush=True)
            continue
        rest = sum(later.seconds for later in options.stages[number:])
        limit = max(5.0, (end - time.monotonic()) * stage.seconds / rest)
        print(f"{stage.name}: {stage.what}, at most {limit:.0f} s", flush=True)
        run_stage(options, stage, limit, command)
    shutil.rmtree(options.out / "parts", ignore_errors=True)
    text, failures = summary.write(options.out, [stage.name for stage in STAGES])
    print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
