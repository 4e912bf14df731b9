"""Timing contenders against each other: one clock, interleaved rounds, paired ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deit.kernels.prove.timing import interleave, median_interval, order

__all__ = ["interleave", "median_interval", "order"]  # timed and counted as `deit tune` does


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
