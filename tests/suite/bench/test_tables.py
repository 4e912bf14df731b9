"""What the tables claim of the times."""

from __future__ import annotations

import pytest
import torch

from race import contenders, tables


def timed(how: str, seconds: list[float]) -> contenders.Contender:
    network = contenders.deit_network("deit_ti")
    module = torch.nn.Identity()
    return contenders.Contender(network, how, "contiguous", module, module, 8, samples=seconds)


DRIFT = [1.0, 3.0, 1.2, 0.9, 2.0, 1.1, 5.0]  # seconds; a neighbour comes and goes


def test_verdict_claims_what_the_paired_ratios_keep_apart() -> None:
    fused = timed("fused", DRIFT)
    apart = tables.verdict(fused, timed("eager", [1.3 * d for d in DRIFT]))
    # The speeds' quartile ranges overlap widely; in every round eager took 1.3 times as long.
    said = "1.30x faster (paired ratio 1.300, 95 % interval 1.300 to 1.300, n=7)"
    assert apart == f"deit_ti fused vs eager: {said}"
    slower = tables.verdict(fused, timed("compiled", [d / 2 for d in DRIFT]))
    assert "fused vs compiled: 2.00x slower" in slower
    few = tables.verdict(timed("fused", DRIFT[:5]), timed("eager", [9.0] * 5))
    assert "fused vs eager: too few rounds to tell (paired ratio 7.500, n=5)" in few


def test_the_same_contender_twice_is_no_difference() -> None:
    fused = timed("fused", DRIFT)
    again = [
        d * noise for d, noise in zip(DRIFT, (1.02, 0.97, 1.01, 0.99, 1.1, 1.0, 0.98), strict=True)
    ]
    for other in (again, DRIFT, [1.004 * d for d in DRIFT]):
        said = tables.verdict(fused, timed("fused", other))
        assert "fused vs fused: no difference (paired ratio 1.00" in said


def test_speed_is_of_the_median_and_the_mean_of_seconds() -> None:
    speed = tables.speeds(timed("fused", [1.0, 2.0, 4.0]))
    assert (speed.median, speed.n) == (4.0, 3)
    assert speed.mean == pytest.approx(8 / (7 / 3))
