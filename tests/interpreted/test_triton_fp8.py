"""Products in e4m3 on Triton against their reference, in the interpreter.

The interpreter's product of e4m3 is right: it multiplies in fp16, which holds e4m3, and adds in
fp32. Its cast to e4m3 is not, so here the kernels round first (`ROUNDS_FIRST`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import deit
from deit.fused_vit import fuse
from deit.kernels import explain, fp8_gelu_mlp, fp8_linear
from deit.kernels.fp8 import tiles as fp8_tiles
from deit.kernels.fp8 import triton as implementation
from deit.kernels.fp8 import triton_product as fp8_product
from deit.kernels.fp8 import triton_rows as fp8_rows
from deit.kernels.fp8.quantize import E4M3, GROUP, quantize
from deit.kernels.prove import oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def layer(depth, width, dtype=torch.float32, seed=1):
    weight = oracle.make("random", (width, depth), dtype, seed=seed, scale=depth**-0.5)
    return weight, oracle.make("random", (width,), dtype, seed=seed + 1)


def norm_of(depth, dtype=torch.float32, seed=7):
    draw = lambda s: oracle.make("random", (depth,), dtype, seed=s)
    return 1 + 0.1 * draw(seed), 0.1 * draw(seed + 1), 1e-6


def to_the_last_bits(out, expected):
    """fp32 sums in another order; half precision to its last bit, which the sum may flip."""
    assert out.dtype == expected.dtype
    step = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[out.dtype]
    difference = (out.float() - expected.float()).abs()
    assert (difference <= step * expected.float().abs() + 1e-6 * expected.abs().max()).all()


def agree(out, expected):
    """All but a hair of the rows to the last bits.

    An ulp of difference before the rounding (LayerNorm's and GELU's own) can take one number to
    the next of e4m3, a sixteenth away.
    """
    difference = (out - expected).abs().float()
    exact = difference <= 4e-6 * expected.abs().max()
    rows = (~exact).flatten(0, -2).any(-1).float().mean()
    assert rows <= 0.05, f"{rows:.1%} of the rows differ"
    assert difference.norm() <= 2e-3 * expected.norm()


def both(call, *arguments, **options):
    return (call(*arguments, impl=impl, **options) for impl in ("triton", "reference"))


@triton.jit
def _cast_kernel(x, out, ROUNDS_FIRST: tl.constexpr):
    at = tl.arange(0, 512)
    values = tl.load(x + at)
    if ROUNDS_FIRST:
        values = fp8_rows._on_grid(values)
    tl.store(out + at, values.to(tl.float8e4nv))


@triton.jit
def _gelu_kernel(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, fp8_product._gelu(tl.load(x + at)))


def test_the_hidden_layers_gelu():
    """To 4e-6 of each value, which takes a number in 100,000 to e4m3's next."""
    ends = torch.tensor([-40.0, 40.0, -torch.inf, torch.nan])
    x = torch.cat([torch.linspace(-4.9, 8, 4092), ends])
    out = torch.empty_like(x)
    _gelu_kernel[(1,)](x, out, 4096)
    exact = torch.nn.functional.gelu(x.double())
    assert ((out - exact) / exact)[:4092].nan_to_num().abs().max() < 4e-6
    assert out[4092:].tolist()[:3] == [0.0, 40.0, 0.0]
    assert out[-1].isnan()


def test_rounding_first_is_pytorchs_cast():
    """And the interpreter's own cast is not: where this stops failing, `ROUNDS_FIRST` may go."""
    x = torch.cat([torch.linspace(-448, 448, 300), torch.logspace(-4, 2.6, 212)])
    expected = x.to(E4M3).float()
    for rounds_first in (True, False):
        out = torch.empty(512, dtype=E4M3)
        _cast_kernel[(1,)](x, out, rounds_first)
        assert torch.equal(out.float(), expected) == rounds_first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 64, 128, 192, 300, 768])
def test_rows_are_the_quantisers_to_the_bit(dim, dtype):
    x = oracle.make("outlier", (21, dim), dtype) * torch.logspace(-2, 2, 21)[:, None].to(dtype)
    x[1] = 0.0
    x[2, dim // 2], x[3, -1], x[4, 0] = torch.nan, torch.inf, -torch.inf
    x[5] *= torch.finfo(dtype).tiny
    x[6] = 448.0 * 2.0 ** torch.randint(-9, 7, (dim,)).to(dtype)
    rows, launch = fp8_rows.plan(x, None)
    launch.run(x)
    e4m3, scales = quantize(x, GROUP)
    torch.testing.assert_close(rows.scales.T, scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rows.e4m3.float(), e4m3.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("depth", "width"), [(192, 576), (768, 130), (64, 10), (7, 5), (1, 129)])
def test_linear(depth, width, dtype):
    """Widths that fill tiles, end within one, and suit no descriptor."""
    x, parameters = oracle.make("random", (2, 67, depth), dtype), layer(depth, width, dtype)
    to_the_last_bits(*both(fp8_linear, x, *parameters))


@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("changes", [{"tma": True}, {"tma": False}, {"block_n": 256}], ids=str)
def test_epilogue(changes, family, monkeypatch):
    monkeypatch.setattr(fp8_tiles, "fp8_product", _configured(**changes))
    x, (weight, bias) = oracle.make(family, (3, 50, 192), mean=100.0), layer(192, 256)
    residual, gamma = oracle.make("random", (3, 50, 256), seed=3), bias.flip(0)
    for options in (
        {"activation": "gelu"},
        {"residual": residual},
        {"residual": residual, "gamma": gamma},
        {"gamma": gamma},
    ):
        to_the_last_bits(*both(fp8_linear, x, weight, bias, **options))
    to_the_last_bits(*both(fp8_linear, x, weight))


def _configured(**changes):
    pinned = fp8_tiles.fp8_product
    return lambda *arguments: replace(pinned(*arguments), **changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 197, 198])
def test_norm(tokens, dtype):
    x = oracle.make("random", (2, tokens, 192), dtype, mean=8.0)
    out, expected = both(fp8_linear, x, *layer(192, 64, dtype), norm=norm_of(192, dtype))
    if dtype == torch.float32:
        agree(out, expected)
    else:
        assert (out - expected).float().norm() <= 6e-3 * expected.float().norm()
    without_bias = (*norm_of(192, dtype)[:1], None, 1e-5)
    out, expected = both(fp8_linear, x, *layer(192, 64, dtype), norm=without_bias)
    assert (out - expected).float().norm() <= 6e-3 * expected.float().norm()


@pytest.mark.parametrize("changes", [{}, {"tma": False, "block_n": 128}], ids=str)
@pytest.mark.parametrize(("depth", "hidden"), [(192, 768), (64, 200), (7, 33)])
def test_mlp(depth, hidden, changes, monkeypatch):
    monkeypatch.setattr(fp8_tiles, "fp8_product", _configured(**changes))
    x = oracle.make("random", (2, 83, depth))
    products = (*layer(depth, hidden), *layer(hidden, depth, seed=3))
    agree(*both(fp8_gelu_mlp, x, *products))
    norm = norm_of(depth)
    agree(*both(fp8_gelu_mlp, x, *products, norm=norm, residual=x, gamma=norm[0]))


@pytest.mark.parametrize(("columns", "width"), [(128, 200), (256, 200), (256, 300), (256, 512)])
def test_the_hidden_layer_is_what_the_quantiser_makes_of_it(columns, width, monkeypatch):
    """Scales of 128 columns whatever the tiles, zeros behind the last column, nothing behind."""
    groups = -(-width // GROUP)
    guarded = torch.full((groups + 1, 70), 7.0)
    x, (weight, bias) = oracle.make("random", (70, 100)), layer(100, width)
    rows, launch = fp8_rows.plan(x, None)
    launch.run(x)
    config = replace(fp8_tiles.fp8_product(90, E4M3, width, 128), block_n=columns)
    empty = fp8_rows.empty
    monkeypatch.setattr(
        fp8_rows, "empty", lambda *shape: empty(*shape)._replace(scales=guarded[:groups])
    )
    hidden, launch = fp8_product.plan_hidden(rows, implementation.kept(weight), bias, config=config)
    launch.run(x)
    e4m3, scales = quantize(fp8_linear(x, weight, bias, activation="gelu", impl="reference"), GROUP)
    assert hidden.e4m3.shape == (70, groups * GROUP)
    assert (guarded[groups] == 7.0).all()
    assert hidden.scales.T.eq(scales).float().mean() > 0.99
    assert (hidden.e4m3.float() == e4m3.float()).float().mean() > 0.999
    assert not hidden.e4m3.float()[:, width:].any()


def test_several_groups_of_tiles(monkeypatch):
    """More tiles than programs, and than a group has rows of tiles."""
    monkeypatch.setattr(fp8_tiles, "fp8_product", _configured(block_m=16, group=2))
    x, parameters = oracle.make("random", (83, 200)), layer(200, 300)
    to_the_last_bits(*both(fp8_linear, x, *parameters))


def test_every_architectures_configuration(monkeypatch):
    x, parameters = oracle.make("random", (2, 70, 96), torch.float16), layer(96, 200, torch.float16)
    chosen = fp8_tiles.fp8_product
    for arch in (89, 90, 100, 120):
        config = chosen(arch, torch.float16, 200, 128)
        monkeypatch.setattr(fp8_tiles, "fp8_product", lambda *_, config=config: config)
        to_the_last_bits(*both(fp8_linear, x, *parameters))


STRIDES = {
    "tokens after the first": lambda x: x[:, 1:],
    "batch and tokens swapped": lambda x: x.transpose(0, 1),
    "rows of odd length": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "last axis strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    x = STRIDES[name](oracle.make("random", (3, 20, 192), torch.float16))
    residual = oracle.make("random", x.shape, torch.float16, seed=6)
    weight, bias = layer(192, 192, torch.float16)
    transposed = weight.T.contiguous().T
    for a, b, w in ((x, residual, weight), (residual, x, weight), (x, residual, transposed)):
        to_the_last_bits(*both(fp8_linear, a, w, bias, residual=b))


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 4, 64), (0, 64), (2, 0, 64)])
def test_ranks(shape):
    x, (weight, bias) = oracle.make("random", shape), layer(64, 40)
    out, expected = both(fp8_linear, x, weight, bias)
    assert out.shape == (*shape[:-1], 40)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert fp8_gelu_mlp(x, weight, bias, weight.T, None, impl="triton").shape == shape


def test_nan_stays_in_its_row():
    x, (weight, bias) = oracle.make("random", (200, 192)), layer(192, 128)
    x[130, 5], x[140, 190], x[150] = torch.nan, torch.inf, 0.0
    for call in (
        lambda: fp8_linear(x, weight, bias, impl="triton"),
        lambda: fp8_gelu_mlp(x, weight, bias, weight.T.contiguous(), None, impl="triton"),
    ):
        out = call()
        assert out.isnan().all(1).nonzero().flatten().tolist() == [130, 140]
        assert out.isnan().any(1).sum() == 2
    assert torch.equal(fp8_linear(x, weight, bias, impl="triton")[150], bias)
    weight[7, 3] = torch.nan
    out = fp8_linear(x[:3], weight, bias, impl="triton")
    assert out.isnan().nonzero()[:, 1].tolist() == [7, 7, 7]


def test_a_changed_weight_is_seen():
    x, (weight, _) = oracle.make("random", (4, 64)), layer(64, 32)
    before = fp8_linear(x, weight, impl="triton")
    weight.mul_(2.0)
    assert torch.equal(fp8_linear(x, weight, impl="triton"), 2 * before)
    weight.data = -weight.clone()
    assert torch.equal(fp8_linear(x, weight, impl="triton"), -2 * before)


def test_explain_names_what_is_launched():
    x, (weight, bias) = oracle.make("random", (4, 64), torch.float16), layer(64, 64, torch.float16)
    found = explain("fp8_gelu_mlp", x, weight, bias, weight, bias)
    assert found.reasons["triton"] == []
    assert [line.partition("(")[0] for line in found.configurations] == [
        "LayerNormConfig", "Fp8Config", "Fp8Config"
    ]  # fmt: skip
    assert all("not tuned on this GPU" in line for line in found.configurations)


@pytest.mark.parametrize("last_block", ["auto", "full"])
def test_a_fused_model(last_block):
    """By its kernels, since it was asked for by name, and close to its reference."""
    config = deit.Config("tiny", embed_dim=64, num_heads=1, depth=2, img_size=32, num_classes=10)
    torch.manual_seed(0)
    model = deit.model.DeiT(config).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        plain = model(images)
        report = fuse(model, dtype="fp8", last_block=last_block)
        assert report.operators["fp8_linear"] == report.operators["fp8_gelu_mlp"] == "triton"
        out = model(images)
        fuse(model, "reference", dtype="fp8", last_block=last_block)
        expected = model(images)
    assert (out - expected).norm() < 0.01 * expected.norm()
    assert 1e-4 < (out - plain).norm() / plain.norm() < 0.1
