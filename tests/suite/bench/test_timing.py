"""The clock, the order of rounds, statistics (evidence/timing.py); what fits (race/planning.py)."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evidence import timing
from race import planning

CPU = torch.device("cpu")


def test_clock_measures_a_sleep() -> None:
    assert 0.020 <= timing.Clock(CPU).time(lambda: time.sleep(0.020)) < 0.060


def test_clock_gives_seconds_per_call() -> None:
    calls = []
    taken = timing.Clock(CPU).time(lambda: calls.append(time.sleep(0.010)), calls=4)
    assert len(calls) == 4
    assert 0.010 <= taken < 0.030


def test_clock_refuses_no_calls() -> None:
    with pytest.raises(ValueError, match="calls: expected at least 1; got 0"):
        timing.Clock(CPU).time(lambda: None, calls=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_clock_waits_for_the_gpu() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    clock = timing.Clock(x.device)
    clock.time(lambda: x @ x)
    one, ten = clock.time(lambda: x @ x), clock.time(lambda: [x @ x for _ in range(10)])
    assert ten > 4 * one


def test_spread_is_numpys_quartiles() -> None:
    found = timing.spread([4.0, 1.0, 3.0, 2.0, 10.0])
    assert (found.low, found.median, found.high, found.mean, found.n) == (2.0, 3.0, 4.0, 4.0, 5)
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        timing.spread([])


def test_interval_of_a_median_is_the_sign_tests() -> None:
    # Of n samples, the ranks that hold the median at 95 %: Conover (1999), table A3.
    for n, rank in ((6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (30, 10)):
        assert timing.median_interval(list(range(n, 0, -1))) == (rank, n + 1 - rank)
    assert timing.median_interval([1.0] * 5) is None
    assert timing.median_interval([]) is None


def test_one_contender_against_itself_is_seldom_claimed_to_differ() -> None:
    """Rounds with drift, noise and now and then an interruption: 2000 comparisons of equals."""
    draw = random.Random(0)
    noisy = lambda drift: [d * draw.gauss(1, 0.05) * (1 + (draw.random() < 0.1)) for d in drift]
    claims = 0
    for _ in range(2000):
        drift = [draw.uniform(1, 3) for _ in range(12)]
        claims += timing.compare(noisy(drift), noisy(drift)).verdict != "no difference"
    assert claims <= 0.05 * 2000
    drift = [draw.uniform(1, 3) for _ in range(12)]
    slower = [1.5 * seconds for seconds in noisy(drift)]
    assert timing.compare(noisy(drift), slower).verdict == "faster"
    assert timing.compare(slower, noisy(drift)).verdict == "slower"


def test_paired_ratio_cancels_drift_common_to_a_round() -> None:
    drift = [1.0, 5.0, 0.3, 2.0]
    ratio = timing.paired_ratio([3.0 * d for d in drift], [2.0 * d for d in drift])
    assert ratio.low == pytest.approx(1.5)
    assert ratio.high == pytest.approx(1.5)
    with pytest.raises(ValueError, match="same rounds; got 1 and 2"):
        timing.paired_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_order_gives_every_contender_every_place_equally(count: int) -> None:
    rounds = [timing.order(count, r) for r in range(2 * count)]
    assert all(sorted(places) == list(range(count)) for places in rounds)
    for place in range(count):
        assert sorted(r[place] for r in rounds) == sorted(list(range(count)) * 2)


def test_interleave_pairs_samples_by_round_and_prepares_each() -> None:
    log: list[object] = []

    def step(name: str, turn: int) -> float:
        log.append((name, turn))
        return float(turn)

    samples = timing.interleave(
        [lambda r: step("a", r), lambda r: step("b", r)],
        10,
        before=log.append,
        enough=lambda done: done == 3,
    )
    assert samples == [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
    assert log == [0, ("a", 0), ("b", 0), 1, ("b", 1), ("a", 1), 2, ("b", 2), ("a", 2)]


def test_default_run_on_two_cores_is_shortened_to_fit() -> None:
    # DeiT-B at 4 images/s: batch 256 would be 65 s a forward.
    assert planning.batch_for_time(256, [0.25, 0.25, 0.25], 9, 240.0) == 32
    assert planning.batch_for_time(256, [1e-4], 9, 240.0) == 256
    assert planning.batch_for_time(100, [1e-4], 9, 240.0) == 100  # fits: left as asked
    assert planning.batch_for_time(256, [60.0], 9, 1.0) == 1


@given(
    st.integers(1, 4096),
    st.lists(st.floats(1e-5, 10.0), min_size=1, max_size=6),
    st.integers(1, 30),
    st.floats(0.1, 1e4),
)
def test_shortened_batch_is_the_largest_power_of_two_in_time(
    asked: int, image_seconds: list[float], rounds: int, seconds: float
) -> None:
    batch = planning.batch_for_time(asked, image_seconds, rounds, seconds)
    cost = sum(image_seconds) * rounds
    assert 1 <= batch <= asked
    assert batch == 1 or batch * cost <= seconds * (1 + 1e-9)
    if batch < asked:
        assert batch & (batch - 1) == 0
        assert 2 * batch * cost > seconds * (1 - 1e-9)


def test_memory_leaves_a_fifth() -> None:
    assert planning.batch_for_memory(256, 10e6, 1.5e9) == 64  # 120 fit in 1.2 GB
    assert planning.batch_for_memory(256, 10e6, 1e12) == 256
    assert planning.batch_for_memory(256, 1e9, 1e6) == 1


def test_rounds_fill_the_seconds_and_respect_what_is_left() -> None:
    plan = planning.plan_rounds([0.001, 0.1], seconds=5.0)
    assert plan.rounds == 20
    assert plan.calls == (250, 2)
    slow = planning.plan_rounds([4.0, 2.0], seconds=40.0)
    assert (slow.rounds, slow.calls) == (10, (1, 1))
    assert planning.plan_rounds([4.0], seconds=0.5).rounds == planning.LEAST_ROUNDS
    assert planning.plan_rounds([4.0, 2.0], seconds=40.0, left=25.0).rounds == 4
    assert planning.plan_rounds([4.0], seconds=40.0, left=-3.0).rounds == 1
    assert planning.plan_rounds([4.0], seconds=40.0, left=math.inf).seconds == 40.0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_batch_halves_with_a_message_until_it_fits(error: Exception) -> None:
    said: list[str] = []

    def attempt(batch: int) -> str:
        if batch > 40:
            raise error
        return f"ran {batch}"

    assert planning.halve_until_it_fits(256, attempt, said.append) == (32, "ran 32")
    assert said == [
        "batch 256 does not fit in memory: trying 128",
        "batch 128 does not fit in memory: trying 64",
        "batch 64 does not fit in memory: trying 32",
    ]


def test_halving_stops_at_one_and_passes_other_errors_on() -> None:
    def never(batch: int) -> None:
        raise torch.OutOfMemoryError

    def broken(batch: int) -> None:
        raise RuntimeError("shape mismatch")

    said: list[str] = []
    with pytest.raises(torch.OutOfMemoryError):
        planning.halve_until_it_fits(2, never, said.append)
    assert len(said) == 1
    with pytest.raises(RuntimeError, match="shape mismatch"):
        planning.halve_until_it_fits(8, broken, said.append)
    assert len(said) == 1


def test_largest_batch_that_fits() -> None:
    def attempt(batch: int) -> None:
        if batch > 100:
            raise torch.OutOfMemoryError

    assert planning.largest_that_fits(attempt) == 64
    assert planning.largest_that_fits(lambda batch: None, ceiling=512) == 512
