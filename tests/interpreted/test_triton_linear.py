"""linear and gelu_mlp on Triton against the fp64 oracle, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deit.kernels import explain, gelu_mlp, linear
from deit.kernels.device import chips, few_rows
from deit.kernels.engine import registry
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.gelu_mlp import triton as mlp_implementation
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as implementation
from deit.kernels.prove import oracle, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _weight(out_features, in_features, dtype=torch.float16, seed=11):
    return oracle.make(
        "random", (out_features, in_features), dtype, seed=seed, scale=in_features**-0.5
    )


def _vector(size, dtype=torch.float16, seed=12):
    return oracle.make("random", (size,), dtype, seed=seed)


def _check(*arguments, config=None):
    if config is None:
        out = registry.COMPILED["triton"]["linear"](*arguments)
    else:
        out = implementation.linear(*arguments, config=config)
    oracle.check(out, reference.linear, arguments)
    return out


def _check_mlp(*arguments, config=None):
    if config is None:
        out = registry.COMPILED["triton"]["gelu_mlp"](*arguments)
    else:
        out = mlp_implementation.gelu_mlp(*arguments, config=config)
    oracle.check(out, reference.gelu_mlp, arguments)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_error_rule(activation, family, dtype):
    x = oracle.make(family, (3, 17, 192), dtype)
    _check(x, _weight(128, 192, dtype), _vector(128, dtype), activation, None, None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(576, 192), (192, 768), (1152, 384), (1000, 192), (64, 64), (10, 24), (7, 5), (1, 192)],
)
def test_widths(out_features, in_features, dtype):
    """Tile multiples, a classifier's 1000, and widths that no descriptor can take."""
    x = oracle.make("random", (2, 17, in_features), dtype)
    weight = _weight(out_features, in_features, dtype)
    _check(x, weight, _vector(out_features, dtype), None, None, None, None)


@pytest.mark.parametrize("tokens", [1, 64, 197, 198, 257])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_rows(batch, tokens):
    x = oracle.make("random", (batch, tokens, 64), torch.float16)
    assert _check(x, _weight(128, 64), None, None, None, None, None).shape == (batch, tokens, 128)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 4, 64), (2, 0, 64)])
def test_ranks(shape):
    x = oracle.make("random", shape, torch.float16)
    _check(x, _weight(32, 64), _vector(32), "gelu", None, None, None)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("stream", [None, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gamma", [None, torch.float32], ids=str)
@pytest.mark.parametrize("keep", [None, torch.float16], ids=str)
def test_epilogue(tma, stream, gamma, keep):
    x = oracle.make("random", (3, 50, 64), torch.float16)
    residual = None if stream is None else oracle.make("random", (3, 50, 256), stream, seed=3)
    gamma = None if gamma is None else _vector(256, gamma, seed=4)
    keep = None if keep is None else torch.tensor([0.0, 1.25, 2.0], dtype=keep)
    config = replace(linear_tiles.linear(90, torch.float16, 256, 64), tma=tma)
    _check(x, _weight(256, 64), _vector(256), "gelu", residual, gamma, keep, config=config)


def test_a_residual_loaded_before_the_sum_gives_the_same_bits():
    x, residual = (oracle.make("random", (3, 50, n), torch.float16, seed=n) for n in (64, 256))
    gamma, keep = _vector(256, torch.float32), torch.tensor([0.0, 1.25, 2.0])
    config = replace(linear_tiles.linear(90, torch.float16, 256, 64), flatten=False)
    arguments = (x, _weight(256, 64), _vector(256), None, residual, gamma, keep)
    early = _check(*arguments, config=replace(config, early=True))
    torch.testing.assert_close(early, _check(*arguments, config=config), rtol=0, atol=0)


@pytest.mark.parametrize("arch", chips.SHARED_MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_architectures_configuration(arch, dtype):
    x = oracle.make("random", (2, 70, 96), dtype)
    for width in (64, 128, 256):
        config = linear_tiles.linear(arch, dtype, width, 96)
        _check(x, _weight(width, 96, dtype), None, None, None, None, None, config=config)


@pytest.mark.parametrize(("rows", "width"), [(80, 48), (83, 40), (16, 48), (90, 16)])
def test_several_groups_of_tiles(rows, width):
    """More rows of tiles than a group has, the last group not full, more tiles than programs."""
    config = linear_tiles.LinearConfig(16, 16, 16, group=2, tma=False, num_warps=4, num_stages=2)
    x = oracle.make("random", (rows, 16))
    _check(x, _weight(width, 16, x.dtype), None, None, None, None, None, config=config)


STRIDES = {
    "tokens after the first": lambda x: x[:, 1:],
    "every second token": lambda x: x[:, ::2],
    "batch and tokens swapped": lambda x: x.transpose(0, 1),
    "rows of odd length": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "odd first element": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "last axis strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1),
    "four axes that do not merge": lambda x: x.view(3, 4, 5, x.shape[-1])[:, 1:, 1:],
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    x = STRIDES[name](oracle.make("random", (3, 20, 192), torch.float16))
    keep = oracle.make("random", x.shape[:1], torch.float16, seed=5)
    contiguous = oracle.make("random", x.shape, torch.float16, seed=6)
    weight, bias = _weight(192, 192), _vector(192)
    _check(x, weight, bias, None, contiguous, None, keep)
    _check(contiguous, weight, bias, None, x, None, keep)
    w1, w2 = _weight(256, 192), _weight(192, 256, seed=13)
    _check_mlp(x, w1, None, w2, None, contiguous, None, keep)
    _check_mlp(contiguous, w1, None, w2, None, x, None, keep)


@pytest.mark.parametrize("name", ["transposed", "rows of odd length", "part of a wider one"])
def test_weight_strides(name):
    weight = {
        "transposed": _weight(64, 64).t(),
        "rows of odd length": _weight(64, 65)[:, :64],
        "part of a wider one": _weight(64, 128)[:, 8:72],
    }[name]
    x = oracle.make("random", (5, 64), torch.float16)
    _check(x, weight, _vector(128)[::2], None, None, None, None)


def test_nan_stays_in_its_row():
    x = oracle.make("random", (200, 64), torch.float16)
    x[130, 5] = torch.nan
    out = _check(x, _weight(64, 64), None, "gelu", None, None, None)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [130]


def test_activations_far_from_zero():
    """All at arguments of +-200, where a careless exp overflows."""
    x = torch.linspace(-200, 200, 64).reshape(4, 16)
    for activation in ACTIVATIONS:
        out = _check(x, torch.eye(16), None, activation, None, None, None)
        assert out.isfinite().all()


def test_offsets_past_32_bits():
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    x = storage.as_strided((2, 64), (2**31, 1))
    x.copy_(oracle.make("random", (2, 64), torch.float16))
    residual = storage.as_strided((2, 64), (2**31, 1))
    for tma in (True, False):
        config = replace(linear_tiles.linear(90, torch.float16, 64, 64), tma=tma)
        _check(x, _weight(64, 64), None, None, residual, None, None, config=config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("dim", [64, 192, 384])
def test_mlp_error_rule(dim, family, dtype, monkeypatch):
    """D = 192 in fp16 is the one-kernel form, the others and few rows are two products."""
    monkeypatch.setattr(gelu_mlp_tiles, "rows_class", lambda _: few_rows.MANY)
    x = oracle.make(family, (2, 35, dim), dtype)
    hidden = 2 * dim  # not 4: interpreting fp32 products takes seconds
    w1, w2 = _weight(hidden, dim, dtype), _weight(dim, hidden, dtype, seed=13)
    b1, b2 = _vector(hidden, dtype), _vector(dim, dtype, seed=14)
    _check_mlp(x, w1, b1, w2, b2, None, None, None)


@pytest.mark.parametrize("stream", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("hidden", [256, 200])
def test_mlp_on_chip(hidden, full, stream):
    """The one-kernel form, also with a hidden layer that is no multiple of its blocks."""
    x = oracle.make("random", (3, 50, 192), torch.float16)
    w1, w2 = _weight(hidden, 192), _weight(192, hidden, seed=13)
    residual = oracle.make("random", x.shape, stream, seed=3)
    b1, b2, gamma, keep = (
        (_vector(hidden), _vector(192), _vector(192, torch.float32), torch.tensor([0.0, 1.25, 2.0]))
        if full
        else (None, None, None, None)
    )
    config = gelu_mlp_tiles.gelu_mlp(90, torch.float16, 192)
    arguments = (x, w1, b1, w2, b2, residual, gamma, keep)
    assert mlp_implementation.plan(*arguments, config=config) is not None
    _check_mlp(*arguments, config=config)


@pytest.mark.parametrize("batch", [0, 1])
def test_mlp_small_batches(batch):
    x = oracle.make("random", (batch, 17, 192), torch.float16)
    w1, w2 = _weight(256, 192), _weight(192, 256, seed=13)
    assert _check_mlp(x, w1, None, w2, None, None, None, None).shape == x.shape


def test_mlp_of_another_width_out():
    x = oracle.make("random", (2, 5, 192), torch.float16)
    w1, w2 = _weight(256, 192), _weight(64, 256, seed=13)
    assert _check_mlp(x, w1, None, w2, None, None, None, None).shape == (2, 5, 64)


def test_through_the_public_functions():
    x = oracle.make("random", (2, 5, 192), torch.float16)
    w1, w2 = _weight(256, 192), _weight(192, 256, seed=13)
    keep = torch.tensor([0.0, 2.0])
    assert explain("linear", x, w1, activation="gelu").reasons["triton"] == []
    assert explain("gelu_mlp", x, w1, None, w2, None, residual=x).reasons["triton"] == []
    oracle.check(
        linear(x, w1, activation="gelu", impl="triton"),
        reference.linear,
        (x, w1, None, "gelu", None, None, None),
    )
    oracle.check(
        gelu_mlp(x, w1, None, w2, None, residual=x, keep=keep, impl="triton"),
        reference.gelu_mlp,
        (x, w1, None, w2, None, x, None, keep),
    )
