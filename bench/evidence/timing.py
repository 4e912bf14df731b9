"""Timing contenders against each other: one clock, interleaved rounds, paired ratios."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """The middle of n samples: first quartile, median, third quartile, and the mean."""

    low: float
    median: float
    high: float
    mean: float
    n: int


def spread(samples: Sequence[float]) -> Spread:
    """Quartiles by linear interpolation between order statistics (numpy's default).

    Raises ValueError for no samples.
    """
    if not samples:
        raise ValueError("samples: expected at least one; got none")
    if len(samples) == 1:
        low = median = high = samples[0]
    else:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(low, median, high, statistics.fmean(samples), len(samples))


def percentile(samples: Sequence[float], percent: float) -> float:
    """By linear interpolation between order statistics, as `spread`'s quartiles.

    Raises ValueError for no samples, or a percentage outside 0 to 100.
    """
    if not samples or not 0 <= percent <= 100:
        raise ValueError(f"samples, percent: expected samples and 0 to 100; got {percent}")
    return float(np.percentile(samples, percent))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of numerator[r] / denominator[r] over rounds r; drift common to a round cancels.

    Raises ValueError where the two were not timed in the same rounds.
    """
    return spread(_ratios(numerator, denominator))


def _ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    if len(numerator) != len(denominator):
        raise ValueError(
            f"numerator, denominator: expected samples of the same rounds; "
            f"got {len(numerator)} and {len(denominator)}"
        )
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """The median of paired ratios over n rounds, and where it lies at a confidence of 95 %.

    low, high: None where the rounds are too few to say.
    """

    ratio: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        """What may be claimed of a ratio of seconds, theirs over mine.

        "faster" or "slower" where the interval leaves out 1 and the ratio is not 1 to two
        decimals; "no difference" otherwise; "too few rounds" where there is no interval.
        """
        if self.low is None or self.high is None:
            return "too few rounds"
        if self.low <= 1 <= self.high or round(self.ratio, 2) == 1:
            return "no difference"
        return "faster" if self.ratio > 1 else "slower"

    def __str__(self) -> str:
        if self.low is None:
            return f"paired ratio {self.ratio:.3f}, n={self.n}"
        where = f"95 % interval {self.low:.3f} to {self.high:.3f}"
        return f"paired ratio {self.ratio:.3f}, {where}, n={self.n}"


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Where the median lies with a confidence of at least 95 %; None for fewer than 6 samples.

    Order statistics, by the sign test: the true median is below the k-th smallest of n samples
    only where fewer than k of n fair coins show tails. It assumes nothing of the distribution,
    which on a shared machine has a long tail, and one interrupted round moves neither end.
    """
    n, tail, k = len(samples), 0.0, 0
    while (tail := tail + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    if k == 0:
        return None
    ordered = sorted(samples)
    return ordered[k - 1], ordered[n - k]


def compare(mine: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """How many times faster I am: theirs[r] / mine[r] over the rounds r in which both were timed.

    Raises ValueError where the two were not timed in the same rounds.
    """
    ratios = _ratios(theirs, mine)
    low, high = median_interval(ratios) or (None, None)
    return Comparison(statistics.median(ratios), low, high, len(ratios))


class Clock:
    """Seconds a call on one device: CUDA events on the GPU, perf_counter elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, step: Callable[[], object], calls: int = 1) -> float:
        """Mean seconds of `calls` consecutive calls, one synchronisation after the last."""
        if calls < 1:
            raise ValueError(f"calls: expected at least 1; got {calls}")
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return (time.perf_counter() - start) / calls
        with torch.cuda.device(self.device):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            for _ in range(calls):
                step()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


def order(count: int, round_index: int) -> list[int]:
    """Who runs when in one round: the start rotates, and every second round runs backwards.

    Over 2 * count rounds each contender stands in each place twice, and no pair always runs in
    the same order, so that heat, clocks and a neighbour's load fall on all alike.
    """
    shift = (round_index // 2) % count if count else 0
    places = [(i + shift) % count for i in range(count)]
    return places[::-1] if round_index % 2 else places


def interleave(
    steps: Sequence[Callable[[int], float]],
    rounds: int,
    *,
    before: Callable[[int], None] = lambda _: None,
    enough: Callable[[int], bool] = lambda _: False,
) -> list[list[float]]:
    """Samples of every step, taken in rounds in which each runs once.

    Args:
        steps: each takes the round's index and returns the seconds it measured.
        rounds: how many rounds, unless `enough` ends them sooner.
        before: called ahead of each round, apart from timing (fresh data).
        enough: asked after each round with the number done; True ends the run.

    Returns:
        samples[i][r], so that samples of one r are a pair.
    """
    samples: list[list[float]] = [[] for _ in steps]
    for r in range(rounds):
        before(r)
        for i in order(len(steps), r):
            samples[i].append(steps[i](r))
        if enough(r + 1):
            break
    return samples
