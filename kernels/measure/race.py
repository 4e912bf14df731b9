"""One problem's candidates, checked and then timed against each other; the verdict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deit.kernels.engine import cache_files, device_key
from deit.kernels.engine.operator import Arguments
from deit.kernels.engine.problems import Problem, dtype_name
from deit.kernels.engine.verdicts import MARGIN, Refused, Rival, Timed, Verdict
from deit.kernels.measure.candidates import REFERENCE, RIVAL, Ways, drawn
from deit.kernels.prove.timing import ColdClock, Paired, cache_bytes, interleave, paired

# After these rounds it is asked whether all is decided. An interval that is looked at four times
# must hold 95 % over all the looks, so each has its share of the 5 %.
LOOKS = (8, 16, 32, 64)
CONFIDENCE = 1 - 0.05 / len(LOOKS)
SAMPLE_SECONDS = 3e-4  # at least, of calls one after another
MOST_CALLS = 20
# A sample is the least of so many calls that take less than so many seconds: what a busy neighbour
# adds is never negative.
REPEATS = ((3, 0.02), (2, 0.1), (1, float("inf")))
TIMES_THE_CACHE = 2  # that the sets of inputs take together
MOST_SETS = 64
MOST_CACHE = 128 << 20  # bytes: of a larger one, a call's inputs may still be there


class NoTime(Exception):
    """Not even the first look fits into what is left of the budget."""


class Poisoned(BaseException):
    """A candidate left the device unusable: this process cannot go on."""


class Failed(Exception):
    """A candidate that was right raised while it was timed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name, self.error = name, error


@dataclass
class Race:
    """One problem on a device.

    mark: told which candidate is begun, before it is. refused: those known to crash, and how.
    seconds: of the budget, for this problem; at most `limit` if the first look takes longer.
    """

    problem: Problem
    device: torch.device
    mark: Callable[[str], object]
    refused: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 5.0
    limit: float = 60.0

    def run(self, number: int) -> Verdict:
        """Check, time, decide. number: of the draw.

        Raises NoTime; else what PyTorch raises where its own operators cannot run the problem.
        """
        end = time.monotonic() + self.seconds
        self.mark("")
        ways = Ways(self.problem, self.device)
        sets = [drawn(self.problem, self.device, number)]
        names = [name for name in ways.names(sets[0]) if name not in self.refused]
        candidates: dict[str, Timed | Refused] = {n: Refused(w) for n, w in self.refused.items()}
        self.mark(REFERENCE)
        ways.step(REFERENCE)(sets[0])
        used: dict[str, float | None] = {}
        for name in names:
            found = self._check(ways, name, sets[0], number)
            if isinstance(found, Refused):
                candidates[name] = found
            else:
                used[name] = found
        while True:
            try:
                samples = self._times(ways, list(used), list(sets), end)
                return self._decide(ways, samples, used, candidates)
            except Failed as failed:
                del used[failed.name]
                if failed.name != RIVAL:
                    candidates[failed.name] = _refused(failed.error)

    def _check(
        self, ways: Ways, name: str, first: Arguments, number: int
    ) -> Refused | float | None:
        """The share of the error rule that it used; None for what the others are held to."""
        if name in (REFERENCE, RIVAL):
            return None

        def draws(again: int) -> Arguments:
            return drawn(self.problem, self.device, number + again) if again else first

        self.mark(name)
        try:
            used = ways.used(name, draws)
        except Exception as error:
            return _refused(error)
        if not used <= 1:
            return Refused(f"wrong: its error is {used:.3g} times what the rule allows")
        return used

    def _times(
        self, ways: Ways, racing: list[str], sets: list[Arguments], end: float
    ) -> dict[str, list[float]]:
        """Seconds of a call of each candidate, by rounds."""
        if racing == [REFERENCE]:
            return {}
        rotate = self.device.type == "cpu" and not ways.operator.eight_bits
        clock = ColdClock(self.device, flush=not rotate)
        if rotate:
            sets += _copies(sets[0], min(MOST_CACHE, cache_bytes(self.device)))
        steps = {name: ways.step(name) for name in racing}
        once = {}
        for name, step in steps.items():
            self.mark(name)
            try:
                step(sets[0])
                once[name] = clock(lambda step=step: step(sets[0]))  # type: ignore[misc]
            except Exception as error:
                if name == REFERENCE:
                    raise
                raise Failed(name, error) from error
        if (LOOKS[0] + 1) * sum(once.values()) > max(self.limit, end - time.monotonic()):
            raise NoTime
        turn = [0]

        def sample(name: str) -> float:
            step = steps[name]
            calls = 1
            if rotate:
                calls = min(MOST_CALLS, len(sets), max(1, round(SAMPLE_SECONDS / once[name])))

            def call() -> None:
                turn[0] += 1
                step(sets[turn[0] % len(sets)])

            self.mark(name)
            repeats = next(n for n, least in REPEATS if once[name] < least)
            try:
                return min(clock(call, calls) for _ in range(repeats))
            except Exception as error:
                if name == REFERENCE:
                    raise
                raise Failed(name, error) from error

        def enough(rounds: int) -> bool:
            if rounds not in LOOKS:
                return time.monotonic() > end and rounds >= LOOKS[0]
            taken = dict(zip(racing, kept, strict=True))
            return time.monotonic() > end or _decided(racing, taken)

        kept: list[list[float]] = [[] for _ in racing]

        def step_of(place: int) -> Callable[[int], float]:
            def one(_: int) -> float:
                kept[place].append(sample(racing[place]))
                return kept[place][-1]

            return one

        interleave([step_of(place) for place in range(len(racing))], LOOKS[-1], enough=enough)
        self.mark("")
        return dict(zip(racing, kept, strict=True))

    def _decide(
        self,
        ways: Ways,
        samples: dict[str, list[float]],
        used: Mapping[str, float | None],
        candidates: dict[str, Timed | Refused],
    ) -> Verdict:
        base = samples.get(REFERENCE, [])
        medians = {name: statistics.median(s) for name, s in samples.items()}
        for name in samples:
            found = _against(samples, name, base)
            if name != RIVAL and found is not None:
                at = medians[name] * 1e6
                candidates[name] = Timed(at, found.ratio, found.low, found.high, used[name])
        order = _order([name for name in samples if ways.chosen(name)], samples)
        winner = order[0] if order else REFERENCE
        rival = None
        if RIVAL in samples:
            found = _against(samples, winner, samples[RIVAL])
            if found is not None:
                own = dtype_name(self.problem.arguments[0].dtype)
                rival = Rival(
                    f"in {own}" if ways.operator.eight_bits else "by its parts",
                    medians[RIVAL] * 1e6, found.ratio, found.low, found.high,
                    found.faster(MARGIN),
                )  # fmt: skip
        key = device_key.device_key(self.device)
        return Verdict(
            self.problem,
            winner,
            candidates,
            cache_files.now(),
            str(key),
            device_key.versions(key.kind),
            tuple(order),
            rival,
        )


def _refused(error: Exception) -> Refused:
    """Raises Poisoned where nothing runs on the device after this error."""
    why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if "CUDA error" in why and "out of memory" not in why:
        raise Poisoned(why) from error
    return Refused(why)


def _copies(first: Arguments, cache: int) -> list[Arguments]:
    """More sets of inputs with the same numbers, until no cache holds all of them."""
    size = sum(a.nbytes for a in first if isinstance(a, Tensor))
    count = min(MOST_SETS, -(-TIMES_THE_CACHE * cache // max(size, 1)))
    return [
        tuple(
            a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in first
        )
        for _ in range(count)
    ]


def _against(samples: Mapping[str, list[float]], name: str, base: list[float]) -> Paired | None:
    return paired(samples[name], base, CONFIDENCE)


def _order(racing: list[str], samples: Mapping[str, list[float]]) -> list[str]:
    """The candidates that displace PyTorch, the winner first: the first of them by default, unless
    another beats it by the same rule."""
    ahead = [name for name in racing if name != REFERENCE and _beats(samples, name, REFERENCE)]
    if not ahead:
        return []
    winner = ahead[0]
    for name in ahead[1:]:
        if _beats(samples, name, winner):
            winner = name
    rest = sorted((n for n in ahead if n != winner), key=lambda n: statistics.median(samples[n]))
    return [winner, *rest]


def _beats(samples: Mapping[str, list[float]], name: str, other: str) -> bool:
    found = _against(samples, name, samples[other])
    return found is not None and found.faster(MARGIN)


def _decided(racing: list[str], samples: Mapping[str, list[float]]) -> bool:
    """Whether every candidate is ahead of PyTorch's or not, and the winner of the others."""
    bases = [REFERENCE, *_order([n for n in racing if n != RIVAL], samples)[:1]]
    pairs = [(name, base) for base in bases for name in racing if name != base]
    found = [_against(samples, name, samples[base]) for name, base in pairs]
    return all(one is not None and one.decided(MARGIN) for one in found)
