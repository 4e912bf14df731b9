"""What runs first on a real GPU, rehearsed on a simulated one: `make gpu`'s stages and `deit tune`.

Sizes are small and clocks tick at each call; the code is what a GPU gets. It finds the faults that
would stop a stage in its first minutes, and no time is measured.
"""

from __future__ import annotations

import contextlib
import time

import gpu
import pytest
import simulator
import torch

import throughput
from deit import tune
from deit.fused_vit import calls as fused_calls
from deit.kernels.prove import calls
from deit.kernels.prove import tune as tuner
from evidence import devices
from operators import measure
from qualification import context as contexts
from qualification import correctness, environment, fp8, models, robustness, speed

_Options = throughput.Options
# CI rehearses one of each kind of kernel.
OPERATORS = (
    calls.operators(implementation="triton")
    if simulator.ASKED == "all"
    else ["layer_norm", "linear", "attention"]
)


@pytest.fixture
def stage(tmp_path):
    """Makes the context of a stage, or of one of its jobs, on the GPU."""
    end = time.monotonic() + 600

    def make(name, job=""):
        return contexts.Context(name, tmp_path, "rehearsal", False, end, job)

    return make


def _whole(context):
    assert context.failures == []
    assert context.unrun == []
    assert context.rows


def test_environment(stage):
    with gpu.cuda():
        context = stage("environment")
        environment.environment(context)
    _whole(context)


@pytest.mark.parametrize("operator", OPERATORS)
def test_correctness(operator, stage, monkeypatch):
    monkeypatch.setattr(correctness, "SHAPES", ((3, 37, 192), (0, 37, 192)))
    with gpu.cuda() as launched:
        context = stage("correctness", f"{operator}:bf16")
        correctness.correctness(context)
    _whole(context)
    assert launched.launches


def test_fp8(stage, monkeypatch):
    monkeypatch.setattr(fp8, "SHAPES", ((2, 37, 192), (0, 37, 192)))
    monkeypatch.setattr(fp8, "DTYPES", ("bf16",))
    with gpu.cuda() as launched:
        context = stage("fp8")
        fp8.fp8(context)
    _whole(context)
    assert launched.launches


@pytest.mark.parametrize("operator", OPERATORS)
def test_robustness(operator, stage, monkeypatch):
    """The same bits, layouts, a side stream, a CUDA graph."""
    monkeypatch.setattr(robustness, "REPEATS", 2)
    monkeypatch.setattr(robustness, "_call", _small)
    with gpu.cuda() as launched:
        context = stage("robustness", operator)
        robustness.robustness(context)
    _whole(context)
    assert {row["check"] for row in context.rows} == {"repeats", "layouts", "stream", "graph"}
    assert not launched.races_unchecked


def _small(context, operator, number=0):
    draw = calls.Draw(dtype=torch.bfloat16, device=context.device, number=number)
    return calls.build(operator, draw, calls.Size(2, 37, 64))


@pytest.mark.parametrize("arch", ["deit_ti"])
def test_tune(arch, tmp_path, monkeypatch, capsys):
    """`deit tune --train`: each kernel's pinned default and another, checked and timed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuner, "FLUSH_BYTES", 1 << 10)
    monkeypatch.setattr(tuner, "FIRST_ROUNDS", 1)
    monkeypatch.setattr(tuner, "ROUNDS", 2)
    measured = []  # another process would measure, which knows no simulated GPU
    monkeypatch.setattr(tune.measure, "measure", lambda found, *_, **__: measured.extend(found))
    # A pretended device has no generator to keep.
    monkeypatch.setattr(fused_calls, "same_generators", lambda _: contextlib.nullcontext())
    options = tune.Options((arch,), ("bf16",), 1, 32, True, (), 2, 600.0, 1, "cuda")
    with gpu.cuda() as launched:
        assert tune.run(options) == 0
    assert {problem.training for problem in measured} == {False, True}
    printed = capsys.readouterr().out
    assert "kept in" in printed
    assert launched.launches > 100


def test_speed(stage, monkeypatch):
    """Races of three operators, forward and backward, captured; without torch.compile."""
    for name, value in {"ROWS": {"batch": 2, "tokens": 5}, "WIDTHS": (64,), "COMPILED": (),
                        "ROUNDS": 2}.items():  # fmt: skip
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "measure_ceilings", lambda _: measure.Ceilings(1e12, 1e15, 1, ""))
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-3)  # a tick: one pass
    monkeypatch.setattr(measure, "copies", lambda *_: 1)
    monkeypatch.setattr(calls, "operators", lambda **_: ["layer_norm", "attention", "vit_block"])
    with gpu.cuda() as launched:
        context = stage("speed")
        speed.speed(context)
    _whole(context)
    assert launched.launches


@pytest.mark.parametrize("impl", ["auto", "triton"][: 2 if simulator.ASKED == "all" else 1])
def test_throughput(impl, stage, monkeypatch):
    """`bench/throughput.py --device cuda`, its CUDA graph too."""
    monkeypatch.setattr(throughput, "Options", _brief)
    monkeypatch.setattr(devices.Peak, "measure", lambda self, seconds=1.0: 1e15)
    with gpu.cuda() as launched:
        context = stage("throughput", f"deit_ti:{impl}")
        models.measure(context, "deit_ti", impl)
    _whole(context)
    assert launched.launches or impl == "auto"


def _brief(**options):
    return _Options(**{**options, "bs": 1, "img_size": 32, "seconds": 0.01, "budget": 0.0})
