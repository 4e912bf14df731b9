"""`deit tune`: what its flags ask for, and the processes that compile for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

import deit
from deit.kernels.device import tuning
from deit.kernels.engine import dispatch

if TYPE_CHECKING:
    from deit.kernels.prove.tuned import Tuned

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What is measured, and how long; the flags of `deit tune` (commands/tune.py)."""

    arch: tuple[str, ...]
    dtype: str
    batch_size: int
    img_size: int | None
    train: bool
    only: tuple[str, ...]
    candidates: int
    seconds: float
    jobs: int | None
    device: str


def run(options: Options) -> int:
    """The command; 1 where a pinned default is wrong or does not run.

    Raises ValueError for an option that makes no sense, before anything is compiled.
    """
    for name in ("batch_size", "candidates", "seconds", "jobs"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number; got {value}")
    device = _device(options.device)
    from deit.kernels.prove import tune  # imports triton

    problems = problems_of(options, device)
    end = time.monotonic() + options.seconds
    if options.jobs != 1:
        for complaint in precompile(options, 0.6 * options.seconds):
            print(complaint)
    outcomes, wrong = tune.measure(problems, options.candidates, end, device, report=print)
    if outcomes:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        print(f"kept in {tuning.store(name, {o.name: o.entry for o in outcomes})}")
    return 1 if wrong else 0


def _device(name: str) -> torch.device:
    """Raises ValueError for what is no device, and where Triton cannot run."""
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
    except RuntimeError:
        raise ValueError(f"device: expected auto or a torch device; got {name!r}") from None
    why_not = dispatch.environment("triton", device.type, device.index)
    if why_not:
        raise ValueError(
            f"device: expected one that Triton runs on; {device}: {'; '.join(why_not)}"
        )
    return device


def problems_of(options: Options, device: torch.device) -> list[Tuned]:
    """What `options` ask for, each entry of the table once.

    Raises ValueError for an unknown network, or a name in `only` that no problem has.
    """
    from deit.kernels.prove.calls import Size
    from deit.kernels.prove.tuned import Terms, tuned

    found: dict[str, Tuned] = {}
    for name in options.arch:
        network = deit.config(name, img_size=options.img_size)
        at = Terms(Size.of(network, options.batch_size), DTYPES[options.dtype], device)
        for problem in tuned(at, options.train):
            found.setdefault(problem.name, problem)
    known = sorted({problem.factory for problem in found.values()})
    if unknown := sorted(set(options.only) - set(known)):
        raise ValueError(f"only: expected kernels among {', '.join(known)}; got {unknown[0]!r}")
    return [p for p in found.values() if not options.only or p.factory in options.only]


def precompile(options: Options, seconds: float) -> list[str]:
    """Compile in several processes: Triton's cache on disk hands the kernels over.

    Returns a sentence for each process that did not come to its end within `seconds`. What it
    left is compiled when it is measured, one kernel after another.
    """
    parts = options.jobs or max(1, min(8, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-m", "deit.tune", json.dumps(asdict(options))]
    running = [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]
    end = time.monotonic() + seconds
    complaints = []
    try:
        for part, process in enumerate(running):
            why = f"stopped after {seconds:.0f} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(0.0, end - time.monotonic()))
                why = f"ended with exit status {status}" if status else ""
            if why:
                complaints.append(f"compiling part {part + 1} of {parts} {why}")
    finally:
        for process in running:
            process.kill()  # nothing where it has ended
            process.wait()
    return complaints


def compile_part(arguments: Sequence[str]) -> None:
    """One process of `precompile`: the options as JSON, the part's number, the number of parts."""
    from deit.kernels.prove import tune

    text, part, parts = arguments
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }
    options = Options(**fields)
    problems = problems_of(options, _device(options.device))
    tune.warm(problems[int(part) :: int(parts)], options.candidates)


if __name__ == "__main__":
    compile_part(sys.argv[1:])
