"""The CUDA kernels on CPU tensors, launchers and all, by the emulator: held to fp64 by the rule."""

from __future__ import annotations

import functools

import pytest
import torch

from deit.kernels import explain, linear
from deit.kernels.engine import dispatch, limits
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.prove import calls, oracle
from deit.kernels.prove.calls import Draw, Size

OPERATORS_HERE = ("layer_norm", "add_layer_norm", "linear", "gelu_mlp", "attention", "patch_embed")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Two tiles of rows, of keys and of columns, none of them whole.
SIZE = Size(2, 70, 72, heads=2, hidden=136, side=3, patch=8)
# No chunk of 16 bytes is whole.
ODD = Size(1, 67, 34, heads=2, hidden=37, width=35, side=2, patch=7)


def run(operator, *arguments):
    return dispatch.run(operator, arguments, "cuda")


def check(name, size, form, families, dtype):
    """The rule over draws of each family: small results have few roundings to compare."""
    for family in families:
        draws = [calls.build(name, Draw(family, dtype, number=n), size, form) for n in range(2)]
        served = [OPERATORS[name].served_by(**d.inputs, **d.options) for d in draws]
        operator = served[0][0]
        kernel = functools.partial(run, operator)
        oracle.check_draws(kernel, operator.reference, [arguments for _, arguments in served],
                           name=f"{name} {family}")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS_HERE)
def test_the_rule(name, dtype, emulated):
    softmax = name == "attention"
    check(name, SIZE, "every", (*oracle.FAMILIES, *["one_hot"] * softmax), dtype)
    check(name, ODD, "every", ("random",), dtype)
    check(name, ODD, "least", ("random",), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, emulated):
    x, weight = torch.randn(3, 30, 40), torch.randn(24, 40) / 6
    for activation in (None, *ACTIVATIONS):
        arguments = (x.to(dtype), weight.to(dtype), None, activation, None, None, None)
        out = linear(*arguments[:2], activation=activation, impl="cuda")
        oracle.check(out, OPERATORS["linear"].reference, arguments, name=str(activation))


def test_wide_heads_and_padding(emulated):
    """Heads of 65 to 128 channels; samples whose keys all have a bias of -inf, or the smallest."""
    qkv = oracle.packed("random", 3, 20, 1, 88, torch.bfloat16)
    key_bias = torch.zeros(3, 20)
    key_bias[0], key_bias[1] = -torch.inf, torch.finfo(torch.float32).min
    key_bias[2, 10:] = -torch.inf
    arguments = (qkv, 1, 88**-0.5, key_bias)
    out = torch.ops.deit_cuda.attention(*arguments)
    assert (out[0] == 0).all()
    oracle.check(out, OPERATORS["attention"].reference, arguments)


def test_strides_and_empty_tensors(emulated):
    """What is not contiguous is read where it lies; no element is no launch."""
    x, weight = torch.randn(2, 3, 5, 16), torch.randn(8, 32)[:, ::2]
    residual = torch.randn(5, 2, 3, 8).permute(1, 2, 0, 3)
    found = linear(x[:, :, ::2], weight, residual=residual[:, :, ::2], impl="cuda")
    expected = residual[:, :, ::2] + x[:, :, ::2] @ weight.T
    torch.testing.assert_close(found, expected)
    assert linear(x[:0], weight, impl="cuda").shape == (0, 3, 5, 8)
    assert linear(x[..., :0], weight[:, :0], impl="cuda").eq(0).all()
    assert torch.ops.deit_cuda.attention(torch.zeros(2, 0, 24), 2, 1.0, None).shape == (2, 0, 8)


def test_what_is_refused(emulated, monkeypatch):
    with pytest.raises(NotImplementedError, match="the kernel is forward-only"):
        linear(torch.randn(4, 8, requires_grad=True), torch.randn(8, 8), impl="cuda")
    assert explain("attention", torch.randn(1, 3, 3 * 136), 1).reasons["cuda"] == [
        "head dimension 136 (served: up to 128)"
    ]
    monkeypatch.setattr(limits, "capability", lambda *_: (7, 5))
    with pytest.raises(NotImplementedError, match=r"need compute capability 8\.0, .* has 7\.5"):
        linear(torch.randn(4, 8), torch.randn(8, 8), impl="cuda")
