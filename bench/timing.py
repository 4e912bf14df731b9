"""Timing contenders against each other: one clock, interleaved rounds, paired ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """The middle of n samples: first quartile, median, third quartile, and the mean."""

    low: float
    median: float
    high: float
    mean: float
    n: int

    def overlaps(self, other: Spread) -> bool:
        """Do the two quartile ranges share a point?"""
        return self.low <= other.high and other.low <= self.high


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
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of numerator[r] / denominator[r] over rounds r; drift common to a round cancels.

    Raises ValueError where the two were not timed in the same rounds.
    """
    if len(numerator) != len(denominator):
        raise ValueError(
            f"numerator, denominator: expected samples of the same rounds; "
            f"got {len(numerator)} and {len(denominator)}"
        )
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


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
