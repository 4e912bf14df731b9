"""Measuring: what is refused, displaced and survived, and what of it the next process knows."""

import os
import re
import subprocess
import sys

import faulty
import pytest
import torch

from deit.kernels import explain, measure
from deit.kernels.engine import device_key, native, verdicts
from deit.kernels.engine.problems import Problem, TensorSpec
from deit.kernels.engine.verdicts import Refused

CPU = torch.device("cpu")
UNKNOWN = "Acme family 1 model 1, AVX2"
pytestmark = pytest.mark.skipif(bool(native.why_not("cpu")), reason="the C++ library is not built")


def problem(name, rows=8):
    return Problem(name, False, (TensorSpec((rows, 64), torch.float32),))


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A machine that nobody has seen, with a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv(device_key.PRETENDED, UNKNOWN)
        verdicts.forget()
        yield folder / "fused-deit"
    verdicts.forget()


@pytest.fixture(scope="module")
def found(unknown):
    """Verdicts of all faulty operators, by name, and what was reported."""
    lines = []
    names = [name for name in faulty.KERNELS if name != "hanging_triple"]
    with faulty.known():
        problems = [problem(name) for name in names]
        assert measure.missing(problems, CPU) == problems
        measured = measure.measure(problems, CPU, budget=30, report=lines.append)
        assert measure.missing(problems, CPU) == []
        yield {one.problem.operator: one for one in measured}, lines


def test_a_fast_kernel_displaces_pytorchs(found):
    verdict = found[0]["right_triple"]
    assert (verdict.winner, verdict.order) == ("cpu", ("cpu",))
    timed = verdict.candidates["cpu"]
    assert 1.02 < timed.low <= timed.ratio <= timed.high
    assert timed.used <= 1


def test_a_slow_kernel_does_not(found):
    verdict = found[0]["slow_triple"]
    assert (verdict.winner, verdict.order) == ("reference", ())
    assert verdict.candidates["cpu"].ratio < 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong_triple", "wrong: its error is .* times what the rule allows"),
        ("raising_triple", "RuntimeError: no kernel image is available"),
        ("crashing_triple", "ended with SIGSEGV"),
        ("later_crashing_triple", "ended with SIGSEGV"),
    ],
)
def test_what_is_wrong_or_crashes_is_refused_by_name(found, name, why):
    verdict, lines = found[0][name], found[1]
    assert verdict.winner == "reference"
    refused = verdict.candidates["cpu"]
    assert isinstance(refused, Refused)
    assert re.search(why, refused.refused)
    assert any(name in line and refused.refused in line for line in lines)


def test_auto_runs_by_the_verdicts_and_explain_says_so(found):
    x = torch.randn(8, 64)
    right, wrong = explain("right_triple", x), explain("wrong_triple", x)
    assert (right.chosen, wrong.chosen) == ("cpu", "reference")
    assert "measured here" in str(right)
    assert "times PyTorch's speed" in str(right)
    assert "refused: wrong" in str(wrong)


def test_a_kernel_that_hangs_is_put_down(unknown, monkeypatch):
    monkeypatch.setattr(measure, "LOOK", 0.2)
    monkeypatch.setattr(measure, "HANGS", 2.0)
    with faulty.known():
        (verdict,) = measure.measure([problem("hanging_triple")], CPU, budget=2, report=print)
    assert verdict.winner == "reference"
    assert "did not come to an end" in verdict.candidates["cpu"].refused


SECOND = """
import sys, torch, faulty, deit.kernels
from deit.kernels import measure
from deit.kernels.engine import dispatch
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.engine.problems import Problem
with faulty.known():
    x = torch.randn(8, 64)
    for name in ("right_triple", "wrong_triple", "slow_triple"):
        operator = OPERATORS[name]
        known = not measure.missing([Problem.of(operator, (x,))], x.device)
        print(name, known, dispatch.choose(operator, (x,), "auto"))
qkv = torch.randn(2, 17, 192, generator=torch.Generator().manual_seed(0))
print(deit.kernels.explain("attention", qkv, 1).chosen)
print(hash(deit.kernels.attention(qkv, 1).numpy().tobytes()))
"""


def test_the_next_process_knows_and_computes_the_same_bits(found):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", SECOND]
    qkv = Problem("attention", False, (TensorSpec((2, 17, 192), torch.float32), 1, 0.125, None))
    (verdict,) = measure.measure([qkv], CPU, budget=10, report=print)
    both = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert both[0] == both[1]
    assert both[0].split("\n")[:4] == [
        "right_triple True cpu", "wrong_triple True reference", "slow_triple True reference",
        verdict.winner,
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), float("inf"), "long", True])
def test_a_budget_that_is_none(budget):
    with pytest.raises(ValueError, match="budget: expected a positive number of seconds"):
        measure.measure([], CPU, budget=budget)


def test_a_device_without_a_key():
    with pytest.raises(ValueError, match="device: expected a CPU or a CUDA device; got meta"):
        measure.measure([], torch.device("meta"), budget=1)


def test_where_no_process_can_be_started_a_sentence_says_so(unknown, monkeypatch):
    lines = []
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with faulty.known():
        assert (
            measure.measure([problem("right_triple", 64)], CPU, budget=5, report=lines.append) == []
        )
    assert any("/nowhere/python" in line for line in lines)
