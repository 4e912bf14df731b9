"""kernels/prove/calls.py: every operator states its calls, in every form, and they run."""

import inspect

import pytest
import torch

import deit
import deit.kernels
from deit.kernels.engine.operator import OPERATORS, operator_names
from deit.kernels.prove import calls

TINY = calls.Size(2, 5, 64, width=32, hidden=96, side=2, classes=10)


def build(operator, form, **given):
    return calls.build(operator, calls.Draw(**given), TINY, form)


def test_every_operator_of_floats_states_its_calls_and_a_part():
    assert set(calls.operators()) == set(operator_names(eight_bits=False))
    assert {part.operator for part in calls.parts()} == set(calls.operators())


@pytest.mark.parametrize("form", calls.FORMS)
@pytest.mark.parametrize("operator", calls.stated())
def test_a_call_runs_and_names_arguments_of_its_function(operator, form):
    call = build(operator, form)
    call.function("reference")(call.inputs)
    parameters = inspect.signature(getattr(deit.kernels, operator)).parameters
    assert {*call.inputs, *call.options} <= set(parameters)
    assert set(call.gradients) <= set(call.inputs)
    assert call.flops[0] > 0
    assert (call.flops[1] > 0) == bool(call.gradients) or OPERATORS[operator].eight_bits


@pytest.mark.parametrize("operator", calls.operators())
def test_every_sets_each_tensor_and_another_draw_is_another(operator):
    """But for what chooses among ways to the same numbers."""
    call, other = build(operator, "every"), build(operator, "every", number=1)
    places, names = call.written(call.inputs)
    prepared = OPERATORS[operator].prepare(*places, **names)
    assert all(value is not None for value in prepared)
    for name, tensor in call.inputs.items():
        if name not in ("keep", "target"):
            assert not torch.equal(tensor, other.inputs[name])


def test_a_dtype_and_a_device_are_those_asked_for():
    call = build("linear", "training", dtype=torch.bfloat16, device=torch.device("meta"))
    assert {(t.dtype, t.device.type) for t in call.inputs.values()} == {(torch.bfloat16, "meta")}


def test_a_networks_sizes():
    distilled = calls.Size.of(deit.config("deit_b_distilled", img_size=384), 3)
    assert (distilled.batch, distilled.tokens, distilled.dim, distilled.heads) == (3, 578, 768, 12)
    embedded = calls.build("patch_embed", calls.Draw(device=torch.device("meta")), distilled)
    assert embedded.inputs["images"].shape == (3, 3, 384, 384)
    assert embedded.inputs["pos_embed"].shape == (1, 578, 768)


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match=r"form: expected one of least, .*; got 'most'"):
        build("linear", "most")
