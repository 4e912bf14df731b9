"""Compilations within a time limit; one that is given up leaves the finished ones alone."""

from __future__ import annotations

import time

import pytest
import torch

from race import compiling


def test_time_limit_interrupts() -> None:
    began = time.perf_counter()
    with pytest.raises(compiling.OutOfTime), compiling.limit(0.05):
        time.sleep(30)
    assert time.perf_counter() - began < 20
    with compiling.limit(0.05):
        pass
    time.sleep(0.08)  # the alarm was called off
    with compiling.limit(None):
        pass


def test_an_abandoned_compilation_leaves_finished_ones_alone() -> None:
    double = torch.compile(lambda x: 2 * x, backend="eager")
    x = torch.ones(3)
    assert torch.equal(double(x), 2 * x)
    graphs = compiling.graphs()
    compiling.abandon()
    double(x)
    assert compiling.graphs() == graphs > 0
