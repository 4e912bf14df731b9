"""Kept calls of Triton operators: the same bits as the call itself, and a key for all they rest on."""

import dataclasses
import importlib

import launches
import pytest
import schema_calls
import torch

from deit.kernels import ops, packing, tuning
from deit.kernels.triton import launching
from deit.kernels.triton import linear as linear_module

TRITON = sorted(ops.KERNELS["triton"])


@pytest.fixture
def driver(monkeypatch):
    for name in TRITON:
        for kept in operators(name):
            monkeypatch.setattr(kept, "calls", {})
    return launches.installed(monkeypatch)


def operators(name):
    """The kept functions of a registered operator: itself; e4m3 keeps what follows its packing."""
    module = importlib.import_module(f"deit.kernels.{ops._triton_module(name)}")
    function = getattr(module, name.replace("fp8", ""), None) or getattr(module, name)
    return [function]


def moved(arguments):
    """Other tensors of the same geometry, elsewhere, with other values."""
    return [
        a + torch.rand_like(a) if torch.is_tensor(a) and a.is_floating_point() else
        a.clone() if torch.is_tensor(a) else a
        for a in arguments
    ]  # fmt: skip


def bits(outputs):
    return [o.clone() for o in schema_calls.each(outputs)]


def same(found, expected):
    for a, b in zip(schema_calls.each(found), schema_calls.each(expected), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("full", [True, False], ids=["full", "plain"])
@pytest.mark.parametrize("name", TRITON)
def test_a_repeated_call_has_the_calls_bits(name, full, dtype, driver):
    """With tensors moved and values changed; the first outputs stay what they were."""
    arguments = schema_calls.arguments(name, "triton", full=full, dtype=dtype)
    (kept,) = operators(name)
    others = moved(arguments)
    if name.startswith("fp8"):
        run = getattr(importlib.import_module("deit.kernels.triton.fp8"), name)
    else:
        run = kept
    first, expected = run(*arguments), kept
    kept_bits = bits(first)
    assert driver.launched == 0
    assert None not in kept.calls.values(), "refused"
    again = run(*others)
    assert driver.launched
    assert len(kept.calls) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "calls", {})
        expected = run(*others)  # a first call
    same(again, expected)
    same(first, kept_bits)
    stored = {o.untyped_storage().data_ptr() for o in schema_calls.each(first) if o.numel()}
    assert not stored & {o.untyped_storage().data_ptr() for o in schema_calls.each(again)}
