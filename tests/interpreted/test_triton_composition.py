"""Every Triton operator as PyTorch sees it: schemas and fakes, compile, export, torch.func."""

import composition
import pytest
import schema_calls
import torch

import deit.kernels
from deit.kernels.engine import dispatch, registry
from deit.kernels.engine.operator import OPERATORS, operator_names

TRITON = sorted(registry.KERNELS["triton"])
PUBLIC = sorted(set(TRITON) & set(operator_names(eight_bits=False)))
TRAINS = [name for name in PUBLIC if f"{name}_bwd" in registry.KERNELS["triton"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("full", [True, False], ids=["full", "plain"])
@pytest.mark.parametrize("name", TRITON)
def test_opcheck(name, full, dtype):
    """With every optional of the schema set, and with none; the forward and training alike."""
    arguments = schema_calls.arguments(name, "triton", full=full, dtype=dtype)
    found = torch.library.opcheck(registry.COMPILED["triton"][name], arguments)
    assert set(found.values()) == {"SUCCESS"}
    assert len(found) == 4


def test_every_optional_is_set_in_the_full_calls():
    for name in TRITON:
        formals = schema_calls.schema(name).arguments
        for value, formal in zip(schema_calls.arguments(name, "triton"), formals, strict=True):
            assert value is not None, f"{name}: {formal.name}"


@pytest.mark.parametrize("name", TRAINS)
def test_fullgraph_compile_with_gradients(name):
    composition.compiled_is_eager(name, "triton")


@pytest.mark.parametrize("name", TRAINS)
def test_frozen_parts_cost_nothing(name):
    composition.frozen_parts_cost_nothing(name, "triton")


@pytest.mark.parametrize("name", PUBLIC)
def test_export_round_trip(name, tmp_path):
    found = composition.exported_is_eager(name, "triton", tmp_path / "program.pt2")
    assert found == {f"deit_triton.{name}"}


@pytest.mark.parametrize("name", PUBLIC)
def test_torch_func_transforms_are_refused(name):
    """The kernels have no batching rule: a named one says so, before it reads anything."""
    run, (first, *rest) = composition.call(name, "triton")
    for transform in (
        lambda: torch.vmap(lambda x: run(x, *rest))(first[None]),
        lambda: torch.func.grad(lambda x: schema_calls.each(run(x, *rest))[0].sum())(first),
    ):
        with pytest.raises(NotImplementedError, match=r"a torch\.func transform is active"):
            transform()


@pytest.mark.parametrize("name", TRAINS)
def test_second_derivatives_are_refused(name):
    run, tensors = composition.call(name, "triton")
    wanted = composition.differentiable(name, tensors)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    loss = sum(o.square().sum() for o in schema_calls.each(run(*leaves)))
    chosen = [leaves[i] for i in wanted]
    grads = torch.autograd.grad(loss, chosen, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in grads).backward()


def test_a_gradient_for_what_has_none_is_refused_by_name():
    for name in TRAINS:
        for position, argument in OPERATORS[name].constants.items():
            arguments = schema_calls.forward(name)
            if not arguments[position].is_floating_point():
                continue
            arguments[position].requires_grad_()
            with pytest.raises(NotImplementedError, match=f"{argument} requires grad"):
                dispatch.run(OPERATORS[name], tuple(arguments), "triton")
    assert (
        deit.kernels.explain("layer_norm", torch.randn(2, 8), torch.ones(8)).reasons["triton"] == []
    )
