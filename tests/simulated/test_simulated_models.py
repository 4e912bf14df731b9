"""Whole networks on a simulated H100: inference, a training step, autocast, e4m3.

Two blocks of DeiT-Ti at 64 pixels with the distillation token, so each operator runs at a real
width. Few numbers come out (logits), so one draw may be lucky: a network may be twice as far from
fp64 as the plain model is in the same dtype, beside the rule's floor.
"""

from __future__ import annotations

import contextlib
import copy

import chains
import fusing
import pytest
import simulator
import torch
from small import SMALL_DISTILLED, network

from deit.fused_vit import fuse
from deit.kernels import explain, int8_linear
from deit.kernels.prove import oracle
from deit.training.distillation import Objective
from deit.training.options import Distillation

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
TARGET, TEACHER = torch.tensor([1, 6, 0]), torch.randn(3, 7, generator=torch.Generator())
HALF = torch.bfloat16
DTYPES = {"bf16": HALF, "fp16": torch.float16, "fp32": torch.float32}
TWICE = 2.0


def _close(got, plain, exact, name=""):
    ours, theirs = oracle.errors(got, exact), oracle.errors(plain, exact)
    floor = oracle.floor(plain.dtype, exact)
    assert ours.norm <= TWICE * theirs.norm + floor.norm, (name, ours, theirs)


def _in_one_chain(dtype):
    return chains.one_chain() if dtype == torch.float32 else contextlib.nullcontext()


def _eager(dtype, images=IMAGES):
    with torch.inference_mode(), _in_one_chain(dtype):
        return network(SMALL_DISTILLED).to(dtype)(images.to(dtype))


@pytest.mark.parametrize("block", ["parts", "whole"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inference(dtype, block, monkeypatch):
    model = network(SMALL_DISTILLED).to(dtype)
    with simulator.device() as launched, torch.inference_mode():
        report = fuse(model, "triton", block=block)
        fusing.forbid_originals(monkeypatch)
        out = model(IMAGES.to(dtype))
    assert ("vit_block" in report.operators) == (block == "whole")
    assert launched.launches > 8
    assert not launched.races_unchecked
    _close(out, _eager(dtype), _eager(torch.float64, IMAGES.to(dtype)))


def test_autocast():
    model, plain = network(SMALL_DISTILLED), network(SMALL_DISTILLED)
    with simulator.device() as launched, torch.inference_mode():
        fuse(model, "triton")
        with torch.autocast("cpu", HALF):
            out, expected = model(IMAGES), plain(IMAGES)
    assert out.dtype == expected.dtype
    assert launched.launches
    _close(out, expected.to(HALF), _eager(torch.float64))


STEPS = [(HALF, "hard"), (torch.float32, "soft"), (HALF, "soft"), (torch.float32, "hard")]


@pytest.mark.parametrize(("dtype", "kind"), STEPS[: 4 if simulator.ASKED == "all" else 2], ids=str)
def test_a_training_step(dtype, kind, monkeypatch):
    """Both classifiers, stochastic depth, the distillation loss; each parameter's gradient."""
    student = network(SMALL_DISTILLED, drop_path=0.2).to(dtype)
    with simulator.device() as launched:
        fused = copy.deepcopy(student)
        fuse(fused, "triton")
        fusing.forbid_originals(monkeypatch)
        ours = _gradients(fused, kind, "triton")
    monkeypatch.undo()
    with _in_one_chain(dtype):
        plain = _gradients(student, kind, "reference")
    exact = _gradients(copy.deepcopy(student).double(), kind, "reference")
    assert launched.launches > 20
    assert not launched.races_unchecked
    assert ours.keys() == plain.keys() == exact.keys()
    torch.testing.assert_close(ours.pop("loss").double(), exact["loss"], rtol=1e-3, atol=0)
    for name, gradient in ours.items():
        _close(gradient, plain[name], exact[name], name)


def _gradients(model, kind, impl):
    """By parameter; and the loss, one number, whose rounding is luck."""
    model.train().zero_grad()
    torch.manual_seed(3)  # which samples stochastic depth drops
    dtype = next(model.parameters()).dtype
    objective = Objective(Distillation(kind=kind), label_smoothing=0.1, impl=impl)
    loss = objective(model(IMAGES.to(dtype)), TARGET, TEACHER.to(dtype))
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def test_e4m3():
    """The kernels' logits beside those of the reference in e4m3."""
    ours, reference = (network(SMALL_DISTILLED).to(HALF) for _ in range(2))
    with simulator.device() as launched, torch.inference_mode():
        report = fuse(ours, "triton", dtype="fp8")
        out = ours(IMAGES.to(HALF))
    fuse(reference, "reference", dtype="fp8")
    with torch.inference_mode():
        expected = reference(IMAGES.to(HALF))
    assert report.operators["fp8_linear"] == "triton"
    assert launched.launches
    assert (out - expected).norm() <= 0.02 * expected.norm()


def test_int8_is_refused():
    x, weight = torch.randn(1, 5, 64), torch.randn(8, 64)
    with simulator.device():
        assert explain("int8_linear", x, weight).reasons["triton"] == [
            "it has no int8_linear kernel"
        ]
        with pytest.raises(NotImplementedError, match="it has no int8_linear kernel"):
            int8_linear(x, weight, impl="triton")
