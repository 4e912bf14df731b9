"""oneDNN's products on the CPU against the fp64 oracle, every optional at a non-default value."""

import oracle
import pytest
import torch

from deit.kernels import explain, gelu_mlp, linear, reference

pytestmark = pytest.mark.skipif(
    bool(explain("linear", torch.randn(2, 3, 8), torch.randn(4, 8)).reasons["cpu"]),
    reason="the CPU library is not built",
)


def arguments(family, batch=3, tokens=17, depth=96, width=160, *, epilogue):
    x = oracle.make(family, (batch, tokens, depth))
    weight = oracle.make("random", (width, depth), seed=1, scale=depth**-0.5)
    bias = oracle.make("random", (width,), seed=2)
    residual = oracle.make("random", (batch, tokens, width), seed=3) if epilogue != "none" else None
    gamma = keep = None
    if epilogue == "all":
        gamma = oracle.make("random", (width,), seed=4)
        keep = torch.tensor([0.0, 1.25, 1.25])[:batch]
    return x, weight, bias, residual, gamma, keep


@torch.no_grad()
@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("epilogue", ["none", "residual", "all"])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_linear(family, epilogue, activation):
    x, weight, bias, residual, gamma, keep = arguments(family, epilogue=epilogue)
    before = None if residual is None else residual.clone()
    out = linear(
        x,
        weight,
        bias,
        activation=activation,
        residual=residual,
        gamma=gamma,
        keep=keep,
        impl="cpu",
    )
    oracle.check(out, reference.linear, (x, weight, bias, activation, residual, gamma, keep))
    assert before is None or torch.equal(residual, before)  # the product may not write into it


@torch.no_grad()
@pytest.mark.parametrize("epilogue", ["none", "residual", "all"])
def test_gelu_mlp(epilogue):
    x, w1, b1, residual, gamma, keep = arguments("random", depth=96, width=96, epilogue=epilogue)
    w2 = oracle.make("random", (96, 96), seed=5, scale=0.1)
    b2 = oracle.make("random", (96,), seed=6)
    out = gelu_mlp(x, w1, b1, w2, b2, residual=residual, gamma=gamma, keep=keep, impl="cpu")
    oracle.check(out, reference.gelu_mlp, (x, w1, b1, w2, b2, residual, gamma, keep))


@torch.no_grad()
def test_strides_and_ranks():
    x = torch.randn(5, 4, 2, 32).transpose(0, 2)[:, 1:]
    weight, bias = torch.randn(32, 24).T, torch.randn(48)[::2]
    out = linear(x, weight, bias, impl="cpu")
    oracle.check(out, reference.linear, (x, weight, bias, None, None, None, None))
    row = torch.randn(32)
    out = linear(row, weight, None, impl="cpu")
    oracle.check(out, reference.linear, (row, weight, None, None, None, None, None))


def test_what_onednn_does_not_take_is_left_to_pytorch():
    with torch.no_grad():
        half = explain("linear", torch.randn(2, 8).half(), torch.randn(4, 8).half())
        empty = explain("linear", torch.randn(0, 8), torch.randn(4, 8))
    assert half.chosen == empty.chosen == "reference"
    assert "fp32 only" in half.reasons["cpu"][0]
    assert "empty axis" in empty.reasons["cpu"][0]
    assert linear(torch.randn(0, 8), torch.randn(4, 8)).shape == (0, 4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "gelu_mlp"])
def test_opcheck(name):
    x, weight, bias, residual, gamma, keep = arguments("random", width=96, epilogue="all")
    operator = getattr(torch.ops.deit_cpu, name).default
    if name == "linear":
        inputs = (x, weight, bias, "gelu", residual, gamma, keep)
    else:
        inputs = (x, weight, bias, weight, bias, residual, gamma, keep)
    torch.library.opcheck(operator, inputs)
