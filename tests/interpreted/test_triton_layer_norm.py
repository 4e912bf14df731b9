"""layer_norm and add_layer_norm on Triton against the fp64 oracle, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from deit.kernels import add_layer_norm, explain, layer_norm
from deit.kernels.engine import registry
from deit.kernels.prove import oracle, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # no product here: bf16 is right too


def _parameters(dim, dtype):
    return oracle.make("random", (dim,), dtype, seed=1), oracle.make(
        "random", (dim,), dtype, seed=2
    )


def _check(x, weight, bias, eps=1e-6):
    out = registry.COMPILED["triton"]["layer_norm"](x, weight, bias, eps)
    oracle.check(out, reference.layer_norm, (x, weight, bias, eps))
    return out


def _check_add(*arguments):
    outputs = registry.COMPILED["triton"]["add_layer_norm"](*arguments)
    oracle.check(outputs, reference.add_layer_norm, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("dim", [64, 192, 384, 1000])
def test_error_rule(family, dim, dtype):
    _check(oracle.make(family, (3, 17, dim), dtype), *_parameters(dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_rms_norm(family, dtype):
    for dim in (192, 1000):
        x = oracle.make(family, (3, 17, dim), dtype)
        for weight in (_parameters(dim, dtype)[0], _parameters(dim, torch.float32)[0]):
            out = registry.COMPILED["triton"]["rms_norm"](x, weight, 1e-5)
            oracle.check(out, reference.rms_norm, (x, weight, 1e-5))


@pytest.mark.parametrize("tokens", [1, 64, 197, 198, 257])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_rows(batch, tokens):
    x = oracle.make("random", (batch, tokens, 192), torch.float16)
    assert _check(x, *_parameters(192, torch.float16)).shape == x.shape


@pytest.mark.parametrize("shape", [(192,), (5, 192), (2, 3, 4, 192), (2, 0, 192), (3, 1)])
def test_ranks(shape):
    _check(oracle.make("random", shape), *_parameters(shape[-1], torch.float32))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_eps_without_bias(eps):
    x = oracle.make("random", (5, 192), scale=1e-3)
    _check(x, _parameters(192, torch.float32)[0], None, eps)


def test_fp32_parameters_beside_half_input():
    _check(oracle.make("outlier", (4, 192), torch.float16), *_parameters(192, torch.float32))


STRIDES = {
    "tokens after the first": lambda x: x[:, 1:],
    "every second token": lambda x: x[:, ::2],
    "batch and tokens swapped": lambda x: x.transpose(0, 1),
    "last axis strided": lambda x: x[..., ::2],
    "part of a wider row": lambda x: x[..., 3:67],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1),
    "four axes that do not merge": lambda x: x.view(3, 4, 5, 192)[:, 1:, 1:],
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    x = STRIDES[name](oracle.make("random", (3, 20, 192)))
    _check(x, *_parameters(x.shape[-1], torch.float32))
    residual = oracle.make("random", x.shape, seed=3)
    keep = oracle.make("random", x.shape[:1], seed=5)
    parameters = _parameters(x.shape[-1], torch.float32)
    _check_add(x, residual, *parameters, 1e-6, None, keep)
    _check_add(residual, x, *parameters, 1e-6, None, keep)


@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("gamma", [None, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("keep", [None, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stream", [torch.float16, torch.float32], ids=str)
def test_add_options(family, gamma, keep, stream):
    x = oracle.make(family, (3, 17, 192), torch.float16, scale=0.5)
    residual = oracle.make("random", x.shape, stream, seed=3)
    weight, bias = _parameters(192, torch.float16)
    if gamma is not None:
        gamma = oracle.make("random", (192,), gamma, seed=4)
    if keep is not None:
        keep = torch.tensor([0.0, 1.25, 2.0], dtype=keep)
    _check_add(x, residual, weight, bias, 1e-6, gamma, keep)


@pytest.mark.parametrize("batch", [0, 1])
def test_add_small_batches(batch):
    x = oracle.make("random", (batch, 17, 192))
    _check_add(
        x, oracle.make("random", x.shape, seed=3), *_parameters(192, x.dtype), 1e-6, None, None
    )


def test_nan_stays_in_its_row():
    x = oracle.make("random", (6, 192))
    x[2, 5] = float("nan")
    out = _check(x, *_parameters(192, torch.float32))
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4, 5]].isfinite().all()


def test_offsets_past_32_bits():
    """Two rows 2**31 elements apart; the 4 GB between them are never touched."""
    storage = torch.empty(2**31 + 192, dtype=torch.float16)
    x = storage.as_strided((2, 192), (2**31, 1))
    x.copy_(oracle.make("random", (2, 192), torch.float16))
    _check(x, *_parameters(192, torch.float16))


def test_through_the_public_functions():
    x, residual = oracle.make("random", (2, 5, 192)), oracle.make("random", (2, 5, 192), seed=3)
    weight, bias = _parameters(192, torch.float32)
    for name in ("layer_norm", "add_layer_norm"):
        inputs = (x, weight) if name == "layer_norm" else (x, residual, weight)
        assert explain(name, *inputs, bias).reasons["triton"] == []
    oracle.check(
        layer_norm(x, weight, bias, impl="triton"), reference.layer_norm, (x, weight, bias, 1e-6)
    )
    oracle.check(
        add_layer_norm(x, residual, weight, bias, impl="triton"),
        reference.add_layer_norm,
        (x, residual, weight, bias, 1e-6, None, None),
    )
