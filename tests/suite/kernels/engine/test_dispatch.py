"""Which implementation runs, and that nothing falls back unseen."""

import warnings

import pytest
import torch
from schema_calls import CALLS

from deit.kernels import attention, explain, gelu_mlp, layer_norm, linear
from deit.kernels.engine import dispatch, measured, registry
from deit.kernels.engine.operator import OPERATORS, operator_names
from deit.kernels.prove import reference
from deit.kernels.vit_block.arguments import BlockArguments

torch.manual_seed(0)  # this module's tensors are the same in every run
X = torch.randn(2, 5, 64)
WEIGHT = torch.ones(64)


def public(name):
    import deit.kernels

    return getattr(deit.kernels, name)


def test_every_schema_has_an_operator_a_reference_and_a_fake():
    assert set(CALLS) == set(operator_names(eight_bits=False))
    for name, operator in OPERATORS.items():
        assert public(name) is operator.public
        assert getattr(reference, name) is operator.reference
        assert name in registry.FAKES
        assert (operator.train is not None) == (f"{name}_bwd" in registry.FAKES)
    for implementation, kernels in registry.KERNELS.items():
        assert kernels <= set(registry.COMPILED[implementation])


def test_a_kernel_for_no_implementation_is_refused():
    with pytest.raises(ValueError, match=r"conv: expected kernels for .*; got \['metal'\]"):
        registry.define("conv", "(Tensor x) -> Tensor", torch.empty_like, metal=registry.CSRC)
    assert "conv" not in registry.FAKES


@pytest.mark.parametrize("name", CALLS)
def test_explain_takes_the_public_functions_arguments(name):
    """And `prepare` gives the schema's, which are as many; `impl` is no user's way to them."""
    args, kwargs = CALLS[name]
    arguments = OPERATORS[name].prepare(*args, **kwargs)
    assert len(arguments) == len(registry.COMPILED["cpu"][name]._schema.arguments)
    with pytest.raises(ValueError, match="impl: expected 'auto' or one of"):
        public(name)(*args, **kwargs, impl="prepare")


def test_explain_takes_options_that_no_schema_has():
    weights = (torch.randn(96, 64), None, torch.randn(64, 96), None)
    found = explain("gelu_mlp", X, *weights, recompute=True)
    assert found.reasons == explain("gelu_mlp", X, *weights).reasons


def test_a_blocks_arguments_are_its_schemas():
    formals = registry.COMPILED["cpu"]["vit_block"]._schema.arguments
    assert tuple(formal.name for formal in formals) == BlockArguments._fields


@pytest.mark.parametrize("name", CALLS)
def test_explain_agrees_with_what_runs(name):
    args, kwargs = CALLS[name]
    explanation = explain(name, *args, **kwargs)
    assert set(explanation.reasons) == set(dispatch.IMPLEMENTATIONS)
    assert explanation.reasons["reference"] == []
    for implementation, why_not in explanation.reasons.items():
        if why_not:
            with pytest.raises(NotImplementedError) as error:
                public(name)(*args, **kwargs, impl=implementation)
            for reason in why_not:
                assert reason in str(error.value)
    public(name)(*args, **kwargs, impl=explanation.chosen)
    assert name in str(explanation)


@pytest.mark.parametrize("name", CALLS)
def test_fake_agrees_with_reference(name):
    """A wrong fake corrupts every compiled graph that holds the operator."""
    args, kwargs = CALLS[name]
    arguments = OPERATORS[name].prepare(*args, **kwargs)
    real = getattr(reference, name)(*arguments)
    meta = registry.COMPILED["cuda"][name](
        *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
    )
    for got, want in zip(_tuple(meta), _tuple(real), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_residual_in_fp32_beside_bf16_input():
    x, residual = X.bfloat16(), torch.randn(2, 5, 32)
    out = linear(x, torch.randn(32, 64).bfloat16(), residual=residual)
    assert out.dtype == torch.float32
    fake = registry.FAKES["linear"](x, torch.randn(32, 64), None, None, residual, None, None)
    assert fake.dtype == torch.float32


def test_unknown_names():
    with pytest.raises(ValueError, match=r"impl: expected 'auto' or one of .* got 'cudnn'"):
        layer_norm(X, WEIGHT, impl="cudnn")
    with pytest.raises(ValueError, match=r"operator: expected one of .* got 'conv'"):
        explain("conv", X)


def test_forward_only_kernels_are_not_used_for_training(monkeypatch):
    forward = {k: {n for n in v if not n.endswith("_bwd")} for k, v in registry.KERNELS.items()}
    monkeypatch.setattr(registry, "KERNELS", forward)
    weight = WEIGHT.clone().requires_grad_()
    with torch.no_grad():
        usable = {n for n, why in explain("layer_norm", X, weight).reasons.items() if not why}
    training = explain("layer_norm", X, weight)
    assert training.chosen == "reference"
    for implementation in usable - {"reference"}:
        assert any("forward-only" in reason for reason in training.reasons[implementation])
    layer_norm(X, weight).sum().backward()
    assert weight.grad is not None


def test_under_vmap_the_result_is_right():
    stacked = torch.randn(3, 2, 5, 64)
    got = torch.vmap(lambda x: layer_norm(x, WEIGHT))(stacked)
    torch.testing.assert_close(got, layer_norm(stacked, WEIGHT))


def test_torch_func_grad():
    grad = torch.func.grad(lambda w: linear(X, w).square().sum())(torch.randn(32, 64))
    assert grad.shape == (32, 64)


def test_operators_of_the_tables_have_the_kernels():
    for prior in measured.TABLES:
        for name, implementations in prior.operators.items():
            for implementation in implementations:
                assert name in registry.KERNELS[implementation]


def test_autocast_reaches_products_and_not_the_norm():
    weight = torch.randn(32, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(X, weight).dtype == torch.bfloat16
        assert linear(X, weight, residual=torch.zeros(2, 5, 32)).dtype == torch.float32
        assert attention(torch.randn(1, 5, 192), 1).dtype == torch.bfloat16
        assert layer_norm(X, WEIGHT).dtype == torch.float32


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_compile_of_the_public_function(name):
    torch._dynamo.reset()  # the operators before this one used up the recompilations allowed
    args, kwargs = CALLS[name]
    function = public(name)
    compiled = torch.compile(lambda *a: function(*a, **kwargs), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, want in zip(
            _tuple(compiled(*args)), _tuple(function(*args, **kwargs)), strict=True
        ):
            torch.testing.assert_close(got, want)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    JAGGED = torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)
    NESTED = torch.nested.nested_tensor([X[0], X[1, :3]])
BAD = {
    "not a tensor": (lambda: layer_norm([1.0], WEIGHT), TypeError, "x: expected a Tensor"),
    "jagged": (lambda: layer_norm(JAGGED, WEIGHT), TypeError, "x: expected a tensor that is not"),
    "nested": (
        lambda: gelu_mlp(NESTED, torch.ones(64, 64), None, torch.ones(64, 64), None),
        TypeError,
        "x: expected a tensor that is not nested",
    ),
    "integers": (lambda: layer_norm(X.int(), WEIGHT), TypeError, "x: expected a floating-point"),
    "width": (lambda: layer_norm(X, torch.ones(63)), ValueError, r"weight: expected shape \(64,\)"),
    "dtype mix": (
        lambda: linear(X, torch.randn(3, 64).half()),
        TypeError,
        "weight: expected torch.float32",
    ),
    "device": (
        lambda: linear(X, torch.randn(3, 64, device="meta")),
        ValueError,
        "weight: expected on cpu",
    ),
    "heads": (
        lambda: attention(torch.randn(1, 5, 192), 5),
        ValueError,
        "D a multiple of num_heads=5",
    ),
    "rank": (lambda: attention(torch.randn(5, 192), 1), ValueError, "qkv: expected rank 3"),
    "head count": (
        lambda: attention(torch.randn(1, 5, 192), 0),
        ValueError,
        "num_heads: expected a positive",
    ),
    "key_bias": (
        lambda: attention(torch.randn(1, 5, 192), 1, key_bias=torch.zeros(1, 4)),
        ValueError,
        r"key_bias: expected shape \(1, 5\)",
    ),
    "keep": (
        lambda: linear(X, torch.randn(3, 64), keep=torch.ones(3)),
        ValueError,
        r"keep: expected shape \(2,\); got \(3,\)",
    ),
    "activation": (
        lambda: linear(X, torch.randn(3, 64), activation="relu"),
        ValueError,
        "activation: expected None or one of 'gelu', .*'silu'; got 'relu'",
    ),
    "activation of an MLP": (
        lambda: gelu_mlp(X, torch.randn(3, 64), None, torch.randn(64, 3), None, activation=None),
        ValueError,
        "activation: expected one of 'gelu', .*'silu'; got None",
    ),
    "eps": (lambda: layer_norm(X, WEIGHT, eps=-1.0), ValueError, "eps: expected a number >= 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
