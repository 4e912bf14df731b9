"""Training of layer_norm and add_layer_norm on Triton, in the interpreter.

The interpreter has 3 multiprocessors, so 6 programs share the rows: 51 rows at D = 192 are 4
blocks of 16, and 150 give some programs several.
"""

from __future__ import annotations

import gradients
import pytest
import torch

from deit.kernels import add_layer_norm, explain, layer_norm, rms_norm
from deit.kernels.engine import registry
from deit.kernels.prove import oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # no product here: bf16 is right too


def _parameters(dim, dtype):
    return [oracle.make("random", (dim,), dtype, seed=seed) for seed in (1, 2)]


def _check(x, weight, bias, eps=1e-6, dout=None):
    dout = oracle.make("random", x.shape, x.dtype, seed=9) if dout is None else dout
    wanted = (0, 1) if bias is None else (0, 1, 2)
    return gradients.check(layer_norm, (x, weight, bias, eps), wanted, (dout,))


def _add(x, residual, weight, bias, eps, gamma, keep, impl):
    return add_layer_norm(x, residual, weight, bias, eps, gamma=gamma, keep=keep, impl=impl)


def _check_add(arguments, douts="both"):
    x, residual = arguments[:2]
    dout = oracle.make("random", x.shape, x.dtype, seed=9)
    dtotal = oracle.make("random", x.shape, residual.dtype, seed=10)
    pair = {"both": (dout, dtotal), "out": (dout, None), "total": (None, dtotal)}[douts]
    wanted = [i for i in (0, 1, 2, 3, 5) if arguments[i] is not None]
    return gradients.check(_add, arguments, wanted, pair)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_error_rule(family, dtype):
    _check(oracle.make(family, (3, 17, 192), dtype), *_parameters(192, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_rms_norm(family, dtype):
    for shape in ((3, 50, 192), (0, 4, 64)):
        x, (weight, _) = oracle.make(family, shape, dtype), _parameters(shape[-1], dtype)
        dout = oracle.make("random", shape, dtype, seed=9)
        gradients.check(rms_norm, (x, weight, 1e-6), (0, 1), (dout,))


# 50 rows a sample: several blocks for a program. 1000 pads to 1024, 1 is its own mean.
@pytest.mark.parametrize("shape", [(3, 50, 64), (2, 7, 1000), (5, 384), (192,), (2, 3, 4, 96),
                                   (3, 1)])  # fmt: skip
def test_shapes(shape):
    _check(oracle.make("random", shape, torch.float16), *_parameters(shape[-1], torch.float16))


@pytest.mark.parametrize("shape", [(0, 17, 192), (3, 0, 192)])
def test_no_rows(shape):
    weight, bias = _parameters(192, torch.float32)
    x = torch.empty(shape)
    _, _, dweight, dbias = _check(x, weight, bias)
    assert not dweight.any()
    assert not dbias.any()
    grads = _check_add((x, x, weight, bias, 1e-6, weight, torch.ones(shape[0])))
    assert not grads[-1].any()


def test_fp32_parameters_beside_half_input():
    _check(oracle.make("outlier", (9, 192), torch.float16), *_parameters(192, torch.float32))


def test_eps_without_bias():
    _check(oracle.make("random", (9, 192), scale=1e-3), _parameters(192, torch.float32)[0], None,
           1e-2)  # fmt: skip


def test_a_mean_of_1000_costs_no_precision():
    """PyTorch's x_hat is off by 3e-5 there, half an ulp of the mean. The rule would allow that."""
    x = oracle.make("large_mean", (9, 384))
    weight, bias = _parameters(384, torch.float32)
    dout = oracle.make("random", x.shape, seed=9)
    arguments = (x, weight, bias, 1e-6)
    found = gradients.check(layer_norm, arguments, (0, 1, 2), (dout,))
    exact = gradients.outputs_and_gradients(layer_norm, "reference", (0, 1, 2), (dout,))
    for ours, oracles in zip(found, exact(*oracle.in_fp64(arguments)), strict=True):
        assert oracle.errors(ours, oracles).norm < 1e-6


STRIDES = {
    "tokens after the first": lambda x: x[:, 1:],
    "batch and tokens swapped": lambda x: x.transpose(0, 1),
    "last axis strided": lambda x: x[..., ::2],
    "part of a wider row": lambda x: x[..., 3:67],
    "one row for all": lambda x: x[:1, :1].expand(3, 20, -1),
    "one number for all": lambda x: x[:1, :1, :1].expand(3, 20, 192),
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    """Of dout in layer_norm, and of each of the four tensors of rows in add_layer_norm."""
    strided = STRIDES[name](oracle.make("random", (3, 20, 192)))
    dim = strided.shape[-1]
    weight, bias = _parameters(dim, torch.float32)
    plain = oracle.make("random", strided.shape, seed=3)
    _check(plain, weight, bias, dout=strided)
    keep = oracle.make("random", strided.shape[:1], seed=5)
    arguments = [plain, strided, weight, bias, 1e-6, weight, keep]
    gradients.check(_add, arguments, (0, 1, 2, 5), (strided, plain))
    arguments[:2] = strided, plain
    gradients.check(_add, arguments, (0, 1, 2, 5), (plain, strided))


@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("stream", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("gamma", "keep"),
    [(None, None), (None, torch.float16), (torch.float16, None), (torch.float32, torch.float32)],
    ids=str,
)
def test_add_options(family, stream, gamma, keep):
    x = oracle.make(family, (3, 50, 192), torch.float16, scale=0.5)
    residual = oracle.make("random", x.shape, stream, seed=3)
    if gamma is not None:
        gamma = oracle.make("random", (192,), gamma, seed=4)
    if keep is not None:
        keep = torch.tensor([0.0, 1.25, 2.0], dtype=keep)
    _check_add((x, residual, *_parameters(192, torch.float16), 1e-6, gamma, keep))


@pytest.mark.parametrize("used", ["out", "total"])
def test_add_with_one_output_used(used):
    x, residual = (oracle.make("random", (2, 9, 192), seed=seed) for seed in (3, 4))
    weight, bias = _parameters(192, torch.float32)
    _check_add((x, residual, weight, bias, 1e-6, weight, torch.tensor([0.0, 1.25])), used)


def test_nan_stays_in_its_row():
    x = oracle.make("random", (6, 192))
    x[2, 5] = float("nan")
    _, dx, dweight, dbias = _check(x, *_parameters(192, torch.float32))
    assert dx[2].isnan().all()
    assert dx[[0, 1, 3, 4, 5]].isfinite().all()
    assert dweight.isnan().all()
    assert dbias.isfinite().all()


def test_repeats_bit_for_bit():
    x, residual, dout = (oracle.make("random", (3, 50, 192), seed=seed) for seed in (3, 4, 5))
    weight, bias = _parameters(192, torch.float32)
    arguments = (x, residual, weight, bias, 1e-6, weight, torch.tensor([0.0, 1.25, 2.0]))
    gradients.check_repeats(_add, arguments, (0, 1, 2, 3, 5), (dout, dout))


def test_frozen_inputs_and_keep():
    """Only what requires grad gets one; keep, for which there is no kernel, is refused by name."""
    x = oracle.make("random", (2, 5, 192))
    weight, bias = _parameters(192, torch.float32)
    out = layer_norm(x, weight.requires_grad_(), bias, impl="triton")
    out.sum().backward()
    assert weight.grad is not None
    assert bias.grad is None
    keep = torch.ones(2, requires_grad=True)
    why_not = explain("add_layer_norm", x, x, weight, keep=keep).reasons["triton"]
    assert why_not == ["keep requires grad and the kernel has no gradient for it"]


def test_opcheck():
    triton = registry.COMPILED["triton"]
    x = oracle.make("random", (2, 5, 64), torch.float16)
    residual = oracle.make("random", (2, 5, 64))
    weight, bias = _parameters(64, torch.float16)
    gamma, keep = oracle.make("random", (64,), seed=4), torch.tensor([0.0, 1.25])
    for options in ((None, None), (gamma, keep)):
        forward = (x, residual, weight, bias, 1e-6, *options)
        torch.library.opcheck(triton["add_layer_norm_fwd"], forward)
        _, total, *statistics = triton["add_layer_norm_fwd"](*forward)
        backward = (x, residual, x, total, weight, *statistics, *options)
        torch.library.opcheck(triton["add_layer_norm_bwd"], backward)
    torch.library.opcheck(triton["layer_norm_fwd"], (x, weight, None, 1e-6))
    _, *statistics = triton["layer_norm_fwd"](x, weight, None, 1e-6)
    torch.library.opcheck(triton["layer_norm_bwd"], (x, x, weight, *statistics))
    torch.library.opcheck(triton["rms_norm_fwd"], (x, weight, 1e-6))
    torch.library.opcheck(triton["rms_norm_bwd"], (x, x, weight, statistics[1]))
