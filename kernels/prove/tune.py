"""What `deit tune` does: measure configurations of the Triton kernels on this GPU.

Every candidate must first agree with PyTorch as closely as PyTorch at the same dtype does with
fp64 (a quarter more error, and half an epsilon). Then candidates are timed in turns, each call
behind a write of 1 GiB that empties L2 and gives the host time to launch. The pinned default stays
unless another is faster by MARGIN and their quartiles do not overlap.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import tuning
from deit.kernels.engine import cache_files
from deit.kernels.prove.tuned import Tuned

NO_TIME = "no time left for"  # begins what `measure` reports where it stops early
MARGIN = 0.02  # about what two runs of one kernel differ by
FLUSH_BYTES = 1 << 30
FIRST_ROUNDS, ROUNDS = 3, 20
KEEP_WITHIN = 1.25  # of the fastest after the first rounds, to be timed further


@dataclass(frozen=True)
class Outcome:
    """One problem's measurement; dropped: candidate -> why it was not timed."""

    name: str
    config: Any
    entry: tuning.Entry
    dropped: dict[str, str]


def candidates_of(problem: Tuned, count: int) -> list[Any]:
    """At most `count` configurations to try, the pinned default first."""
    return tuning.TUNABLE[problem.factory].candidates(problem.arguments)[: max(1, count)]


def warm(problems: Sequence[Tuned], count: int, end: float = float("inf")) -> None:
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
    problems: Sequence[Tuned],
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
    problem: Tuned, tensors: Sequence[Tensor], configs: Sequence[Any], end: float
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
    problem: Tuned,
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
        cache_files.now(),
    )
    return Outcome(problem.name, config, entry, dropped)


def _clearly_faster(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """By MARGIN in the median, with quartile ranges apart."""
    (_, middle, high), (low, other, _) = (statistics.quantiles(s, n=4) for s in (ours, theirs))
    return middle < (1 - MARGIN) * other and high < low
