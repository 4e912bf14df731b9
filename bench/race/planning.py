"""What fits: the batch and the rounds that a time budget and a memory allow. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

ROUNDS = 20  # of the modern protocol: quartiles of 20 samples are steady to a few per cent
LEAST_ROUNDS = 7  # below it quartiles say little; batches are shortened until these fit
LEAST_KEPT = 3  # rounds that are evidence: fewer have no quartiles
PRELIMINARY_ROUNDS = 3
MOST_LATENCIES = 1000  # samples of a contender: their p99 is the tenth largest


def floor_power_of_two(value: float) -> int:
    """The largest power of two that is at most `value`; 1 below 2."""
    return 1 if value < 2 else 1 << (math.floor(value).bit_length() - 1)


def shorten(asked: int, largest: float) -> int:
    """`asked` where it is at most `largest`, else the largest power of two below; at least 1."""
    return asked if asked <= largest else floor_power_of_two(largest)


def batch_for_time(
    asked: int, seconds_per_image: Sequence[float], rounds: int, seconds: float
) -> int:
    """The batch with which `rounds` rounds of all contenders take at most `seconds`."""
    per_image = sum(seconds_per_image) * rounds
    return shorten(asked, seconds / per_image) if per_image > 0 else asked


def batch_for_memory(asked: int, bytes_per_image: float, available: float) -> int:
    """The batch whose activations fit in four fifths of `available` bytes.

    A fifth is left: the estimate grows a small batch's peak in proportion, which is right for
    activations and ignores a convolution library's choice of another algorithm.
    """
    return shorten(asked, 0.8 * available / bytes_per_image) if bytes_per_image > 0 else asked


@dataclass(frozen=True)
class Rounds:
    """How many rounds, and how many consecutive calls each contender makes in one."""

    rounds: int
    calls: tuple[int, ...]
    seconds: float


def plan_rounds(
    call_seconds: Sequence[float], seconds: float, left: float = math.inf, rounds: int = ROUNDS
) -> Rounds:
    """Rounds that give each contender about `seconds`, all of them within `left` seconds.

    Fast contenders repeat calls to fill seconds / rounds; slow ones make one call and fewer
    rounds, at least LEAST_ROUNDS unless `left` forbids, and never under 1.
    """
    slot = seconds / rounds
    calls = tuple(max(1, int(slot / max(each, 1e-9))) for each in call_seconds)
    cost = sum(n * each for n, each in zip(calls, call_seconds, strict=True))
    slowest = max(max(call_seconds), slot)
    wanted = max(LEAST_ROUNDS, min(rounds, round(seconds / slowest)))
    affordable = wanted if math.isinf(left) else int(left / max(cost, 1e-9))
    count = max(1, min(wanted, affordable))
    return Rounds(count, calls, count * cost)


def plan_latency(call_seconds: Sequence[float], seconds: float, left: float = math.inf) -> Rounds:
    """Rounds of one timed call each, as single requests come, and one untimed before it.

    As many as give the slowest contender `seconds` of timed calls, MOST_LATENCIES at most.
    """
    cost = 2 * sum(call_seconds)
    wanted = min(MOST_LATENCIES, int(seconds / max(*call_seconds, 1e-9)))
    count = max(1, wanted if math.isinf(left) else min(wanted, int(left / max(cost, 1e-9))))
    return Rounds(count, (1,) * len(call_seconds), count * cost)


def is_out_of_memory(error: BaseException) -> bool:
    """An allocation that failed, on a GPU or on the CPU (whose allocator has no own type)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def halve_until_it_fits(
    batch: int, attempt: Callable[[int], T], say: Callable[[str], None]
) -> tuple[int, T]:
    """`attempt(batch)`, with half the batch and a message each time memory runs out.

    Returns the batch that fitted and what `attempt` returned. Raises what it raised where even
    one image does not fit, and every other error at once.
    """
    while True:
        try:
            return batch, attempt(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or batch == 1:
                raise
        say(f"batch {batch} does not fit in memory: trying {batch // 2}")
        batch //= 2


def largest_that_fits(attempt: Callable[[int], object], ceiling: int = 8192) -> int:
    """The largest power of two up to `ceiling` for which `attempt` has memory; at least 1."""
    batch = 1
    while batch <= ceiling:
        try:
            attempt(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or batch == 1:
                raise
            return batch // 2
        batch *= 2
    return ceiling
