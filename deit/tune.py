"""`deit tune`: measure configurations of the Triton kernels on this GPU and keep the best.

Every candidate must first agree with PyTorch as closely as PyTorch at the same dtype does with
fp64 (a quarter more error, and half an epsilon). Then candidates are timed in turns, each call
behind a write of 1 GiB that empties L2 and gives the host time to launch. The pinned default stays
unless another is faster by MARGIN and their quartiles do not overlap.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import deit
from deit.kernels.engine import dispatch, tuning

if TYPE_CHECKING:
    from deit.tune_problems import Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NO_TIME = "no time left for"  # begins what `measure` reports where it stops early
MARGIN = 0.02  # about what two runs of one kernel differ by
FLUSH_BYTES = 1 << 30
FIRST_ROUNDS, ROUNDS = 3, 20
KEEP_WITHIN = 1.25  # of the fastest after the first rounds, to be timed further


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


@dataclass(frozen=True)
class Outcome:
    """One problem's measurement; dropped: candidate -> why it was not timed."""

    name: str
    config: Any
    entry: tuning.Entry
    dropped: dict[str, str]


def run(options: Options) -> int:
    """The command; 1 where a pinned default is wrong or does not run.

    Raises ValueError for an option that makes no sense, before anything is compiled.
    """
    for name in ("batch_size", "candidates", "seconds", "jobs"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number; got {value}")
    device = _device(options.device)
    problems = problems_of(options, device)
    end = time.monotonic() + options.seconds
    if options.jobs != 1:
        for complaint in precompile(options, 0.6 * options.seconds):
            print(complaint)
    outcomes, wrong = measure(problems, options.candidates, end, device, report=print)
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


def problems_of(options: Options, device: torch.device) -> list[Problem]:
    """What `options` ask for, each entry of the table once.

    Raises ValueError for an unknown network, or a name in `only` that no problem has.
    """
    from deit.tune_problems import Size, problems

    found: dict[str, Problem] = {}
    for name in options.arch:
        network = deit.config(name, img_size=options.img_size)
        size = Size(options.batch_size, network, DTYPES[options.dtype], device)
        for problem in problems(size, options.train):
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
    text, part, parts = arguments
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }
    options = Options(**fields)
    problems = problems_of(options, _device(options.device))
    warm(problems[int(part) :: int(parts)], options.candidates)


def candidates_of(problem: Problem, count: int) -> list[Any]:
    """At most `count` configurations to try, the pinned default first."""
    from deit.kernels.device import candidates

    return candidates.candidates(problem.factory, problem.arguments)[: max(1, count)]


def warm(problems: Sequence[Problem], count: int, end: float = float("inf")) -> None:
    """Run every candidate once, so that it is compiled; `measure` says which cannot run."""
    for problem in problems:
        tensors = problem.make()
        for config in candidates_of(problem, count):
            if time.monotonic() > end:
                return
            try:
                problem.run(config, tensors)
            except Exception:
                continue


def measure(
    problems: Sequence[Problem],
    count: int,
    end: float,
    device: torch.device,
    report: Callable[[str], object],
) -> tuple[list[Outcome], list[str]]:
    """Outcomes, and what is wrong with pinned defaults; starts no problem after `end`."""
    outcomes, wrong = [], []
    for index, problem in enumerate(problems):
        if time.monotonic() > end:
            report(f"{NO_TIME} {len(problems) - index} of {len(problems)} kernels")
            break
        tensors = problem.make()
        sound, dropped = check(problem, tensors, candidates_of(problem, count), end)
        pinned = tuning.TUNABLE[problem.factory].pinned(**problem.arguments)
        if pinned not in sound and str(pinned) in dropped:
            wrong.append(f"{problem.name}: pinned {pinned}: {dropped[str(pinned)]}")
            report(wrong[-1])
        if not sound:
            continue
        timer = Timer(device)
        outcome = choose(problem, tensors, sound, pinned, timer, dropped)
        outcomes.append(outcome)
        entry = outcome.entry
        before = f"{entry.pinned_microseconds:.1f}" if entry.pinned_microseconds else "?"
        report(f"{problem.name}: {before} -> {entry.microseconds:.1f} us, {outcome.config}, of "
               f"{entry.candidates} ({len(dropped)} dropped)")  # fmt: skip
    return outcomes, wrong


def check(
    problem: Problem, tensors: Sequence[Tensor], configs: Sequence[Any], end: float
) -> tuple[list[Any], dict[str, str]]:
    """The candidates that compute the right thing, and why others do not; at least the first
    is tried, and none is begun after `end`."""
    exact = problem.plain([t.double() for t in tensors])
    limits = [
        1.25 * _error(theirs, best) + torch.finfo(theirs.dtype).eps / 2
        for theirs, best in zip(problem.plain(tensors), exact, strict=True)
    ]
    sound, dropped = [], {}
    for number, config in enumerate(configs):
        if number and time.monotonic() > end:
            dropped[str(config)] = "no time left"
            continue
        try:
            errors = [
                _error(o, e) for o, e in zip(problem.run(config, tensors), exact, strict=True)
            ]
        except Exception as error:  # the compiler's, for lack of registers or shared memory
            if "illegal memory access" in str(error):
                raise
            dropped[str(config)] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        above = [f"{e:.3g} > {m:.3g}" for e, m in zip(errors, limits, strict=True) if not e <= m]
        if above:
            dropped[str(config)] = "error " + ", ".join(above)
        else:
            sound.append(config)
    return sound, dropped


def _error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm().clamp_min(1e-300))


class Timer:
    """Seconds of one call with a cold L2: by events on a GPU, by the clock elsewhere.

    rounds: those after which slow candidates are out, and those that decide; the interpreter,
    whose times mean nothing, gets as few as can be.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.rounds = (FIRST_ROUNDS, ROUNDS) if self.cuda else (1, 2)
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def choose(
    problem: Problem,
    tensors: Sequence[Tensor],
    configs: Sequence[Any],
    pinned: Any,
    timer: Timer,
    dropped: dict[str, str],
) -> Outcome:
    """Time the candidates in turns, the slow ones only at first."""
    samples: list[list[float]] = [[] for _ in configs]
    racing = list(range(len(configs)))
    first, rounds = timer.rounds
    for number in range(first + rounds):
        if number == first:
            fastest = min(statistics.median(s) for s in samples)
            racing = [
                i
                for i in racing
                if statistics.median(samples[i]) <= KEEP_WITHIN * fastest or configs[i] == pinned
            ]
            samples = [[] for _ in configs]
        for i in racing if number % 2 else reversed(racing):
            samples[i].append(timer(lambda i=i: problem.run(configs[i], tensors)))  # type: ignore[misc]
    medians = {i: statistics.median(samples[i]) for i in racing}
    best = min(racing, key=medians.__getitem__)
    at = configs.index(pinned) if pinned in configs else None
    if at is not None and not _clearly_faster(samples[best], samples[at]):
        best = at
    config = configs[best]
    entry = tuning.Entry(
        None if config is None else asdict(config),
        medians[best] * 1e6,
        None if at is None else medians[at] * 1e6,
        len(configs),
        tuning.now(),
    )
    return Outcome(problem.name, config, entry, dropped)


def _clearly_faster(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """By MARGIN in the median, with quartile ranges apart."""
    (_, middle, high), (low, other, _) = (statistics.quantiles(s, n=4) for s in (ours, theirs))
    return middle < (1 - MARGIN) * other and high < low


if __name__ == "__main__":
    compile_part(sys.argv[1:])
