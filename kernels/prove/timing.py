"""How contenders are timed against each other: in interleaved rounds, by paired ratios."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

GPU_FLUSH = 1 << 30  # bytes: more than any L2 holds, and time for the host to launch
CPU_FLUSH = (32 << 20, 256 << 20)  # bytes, the least and the most


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


def median_interval(
    samples: Sequence[float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Where the median lies with at least this confidence; None for too few samples (95 %: 6).

    Order statistics, by the sign test: the true median is below the k-th smallest of n samples
    only where fewer than k of n fair coins show tails. It assumes nothing of the distribution,
    which on a shared machine has a long tail, and one interrupted round moves neither end.
    """
    n, tail, k = len(samples), 0.0, 0
    while (tail := tail + math.comb(n, k) / 2**n) <= (1 - confidence) / 2 + 1e-12:
        k += 1
    if k == 0:
        return None
    ordered = sorted(samples)
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True)
class Paired:
    """How many times faster one contender is than another: the median of the rounds' ratios, and
    where it lies."""

    ratio: float
    low: float
    high: float

    def faster(self, margin: float) -> bool:
        """Whether all of the interval says so, by more than a share `margin` of the time."""
        return self.low > 1 / (1 - margin)

    def decided(self, margin: float) -> bool:
        """Whether the interval lies on one side of the margin."""
        return self.faster(margin) or self.high <= 1 / (1 - margin)


def paired(
    mine: Sequence[float], theirs: Sequence[float], confidence: float = 0.95
) -> Paired | None:
    """theirs[r] / mine[r] over the rounds; None where the rounds are too few to say."""
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    interval = median_interval(ratios, confidence)
    return None if interval is None else Paired(statistics.median(ratios), *interval)


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: a GPU's L2, a CPU's largest; 32 MiB where none is told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        found.append(int(text.rstrip("KM")) * unit)
    return max(found)


class ColdClock:
    """Seconds of calls that find nothing of theirs in the caches: by events on a GPU, by the clock
    elsewhere. A buffer larger than the caches is written first, unless the calls' own inputs are
    rotated past them."""

    def __init__(self, device: torch.device, *, flush: bool = True) -> None:
        self.cuda = device.type == "cuda"
        least, most = CPU_FLUSH
        size = GPU_FLUSH if self.cuda else min(most, max(least, 2 * cache_bytes(device)))
        self.flush = torch.empty(size if flush else 1, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object], calls: int = 1) -> float:
        """Seconds a call, of `calls` one after another."""
        self.flush.zero_()
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
