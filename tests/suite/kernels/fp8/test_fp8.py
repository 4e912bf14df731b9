"""Products in e4m3: the rounding against PyTorch's casts, the reference against fp64, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from deit.kernels import explain, fp8, fp8_gelu_mlp, fp8_linear, gelu_mlp, linear
from deit.kernels.engine import measured, packing, registry
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.fp8.quantize import E4M3, GROUP, LARGEST, quantize, rounded
from deit.kernels.prove import oracle, reference


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def layer(depth, width, seed=1, dtype=torch.float32):
    weight = oracle.make("random", (width, depth), dtype, seed=seed, scale=depth**-0.5)
    return weight, oracle.make("random", (width,), dtype, seed=seed + 1)


def decibels(out, exact):
    return 20 * math.log10(exact.norm() / (out.double() - exact).norm())


EVERY = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
EVERY = EVERY[EVERY.isfinite()]  # 254 values, both zeros among them


def test_every_value_of_the_format_comes_back():
    x = torch.stack([EVERY, EVERY * 2.0**-90, EVERY * 2.0**60])
    assert torch.equal(rounded(x, 254), x)
    _, scales = quantize(x, 254)
    assert scales.flatten().tolist() == [1.0, 2.0**-90, 2.0**60]


def test_rounds_to_the_nearest_value_and_ties_to_even():
    """The result is the nearest of all values, by distance: no cast is trusted."""
    grid = EVERY.unique()
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middle, torch.nextafter(middle, grid[1:]), torch.linspace(-448, 448, 999)])
    x = torch.cat([x, torch.tensor([LARGEST])])
    found = rounded(x, len(x))
    distance = (x[:, None].double() - grid.double()).abs()
    least = distance.amin(1)
    assert torch.equal((x.double() - found.double()).abs(), least)
    tied = (distance == least[:, None]).sum(1) > 1
    assert tied.sum() == len(middle)
    bits = found[tied].to(E4M3).view(torch.uint8)
    assert not (bits & 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_are_the_least_powers_of_two(dtype):
    x = (torch.randn(50, 300) * torch.logspace(-3, 3, 50)[:, None]).to(dtype)
    e4m3, scales = quantize(x, GROUP)
    assert (e4m3.shape, scales.shape) == ((50, 384), (50, 3))
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    largest = torch.stack([x[:, at : at + GROUP].abs().amax(1) for at in (0, 128, 256)], 1).float()
    assert (largest <= LARGEST * scales).all()
    assert (largest > LARGEST / 2 * scales).all()
    assert not e4m3.float()[:, 300:].any()


@pytest.mark.parametrize(
    "largest", [448.0, 448.00003, 447.99997, 1.0, 224.0, 1e-44, 2.0**127, 3e38]
)
def test_the_edges_of_a_scale(largest):
    x = torch.zeros(1, GROUP)
    x[0, 3] = -largest
    e4m3, scales = quantize(x, GROUP)
    expected = max(math.ceil(math.log2(float(x.abs().max()) / 448)), -126)
    assert scales.item() == 2.0**expected
    assert e4m3.float().isfinite().all()  # which torch 2.11 cannot ask of e4m3
    assert abs(e4m3.float()[0, 3].item()) <= LARGEST


@pytest.mark.parametrize(("width", "cost"), [(GROUP, 0.27), (768, 0.05)])
def test_what_powers_of_two_cost(width, cost):
    """The comparison is with amax / 448, which makes each group's largest number exact."""
    x = oracle.make("random", (512, 768))
    blocks = x.unflatten(-1, (-1, width))
    scales = blocks.abs().amax(-1, keepdim=True) / LARGEST
    other = ((blocks / scales).to(E4M3).float() * scales).flatten(-2)
    ours = decibels(rounded(x, width), x.double())
    assert abs(decibels(other, x.double()) - ours - cost) < 0.03
    assert 31.4 < ours < 31.7


def test_what_is_not_finite():
    x = torch.ones(5, 256)
    x[0, 5], x[1, 130], x[2, 0] = torch.nan, torch.inf, -torch.inf
    x[3] = 0.0
    e4m3, scales = quantize(x, GROUP)
    assert scales.isnan().tolist() == [
        [True, False],
        [False, True],
        [True, False],
        *2 * [[False] * 2],
    ]
    assert not e4m3.float()[0, :128].any()
    assert not e4m3.float()[3].any()


# A product's factors have 31.5 dB of noise each, 28.5 together; the bias carries as much signal
# as the product, 3 dB more. Its second product costs the MLP what the first did.
def test_signal_to_noise_against_fp64():
    x = oracle.make("random", (197, 384))
    w1, b1 = layer(384, 1536)
    w2, b2 = layer(1536, 384, seed=3)
    pairs = {
        31.0: (fp8_linear(x, w1, b1), linear, (x, w1, b1)),
        29.0: (fp8_gelu_mlp(x, w1, b1, w2, b2), gelu_mlp, (x, w1, b1, w2, b2)),
    }
    for least, (out, plain, arguments) in pairs.items():
        exact = plain(*oracle.in_fp64(arguments), impl="reference")
        assert decibels(out, exact) >= least, plain.__name__


def test_epilogue_and_norm():
    """Every option is held to the same arithmetic in fp64 on the rounded factors."""
    x = oracle.make("random", (2, 9, 200))
    weight, bias = layer(200, 70)
    norm = (1 + bias[:1].expand(200) * 0.1, weight[0].contiguous(), 1e-6)
    residual, gamma = oracle.make("random", (2, 9, 70), seed=9), bias.flip(0)

    def exact(x):
        factors = rounded(x, GROUP).double(), rounded(weight, 200).double()
        return factors[0] @ factors[1].T + bias

    normed = F.layer_norm(x, (200,), *norm)
    for options, expected in (
        ({}, exact(x)),
        ({"norm": norm}, exact(normed)),
        ({"activation": "gelu"}, F.gelu(exact(x))),
        ({"residual": residual, "gamma": gamma}, residual + gamma * exact(x)),
    ):
        out = fp8_linear(x, weight, bias, **options)
        assert (out - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    """The result is that of fp32 on the same numbers, rounded: the hidden layer is not."""
    x, (w1, b1) = oracle.make("random", (3, 100), dtype), layer(100, 256, dtype=dtype)
    w2, _ = layer(256, 100, seed=5, dtype=dtype)
    arguments = (x, w1, b1, w2, None)
    wide = (None if t is None else t.float() for t in arguments)
    expected = fp8_gelu_mlp(*wide, residual=x.float()).to(dtype)
    assert torch.equal(fp8_gelu_mlp(*arguments, residual=x), expected)


def test_rows_that_are_not_finite_are_nan():
    x = oracle.make("random", (8, 192))
    x[3, 191], x[5, 0], x[7] = torch.nan, torch.inf, 0.0
    weight, bias = layer(192, 40)
    out = fp8_linear(x, weight, bias)
    assert out.isnan().all(1).tolist() == [i in (3, 5) for i in range(8)]
    assert out[[0, 1, 2, 4, 6, 7]].isfinite().all()
    assert torch.equal(out[7], bias)
    weight[5, 6] = torch.nan
    assert fp8_linear(x[:3], weight, bias).isnan().nonzero()[:, 1].tolist() == [5, 5, 5]


def test_packed_layout():
    pytest.importorskip("triton")
    from deit.kernels.fp8 import triton as implementation

    weight, _ = layer(200, 35)
    made = implementation.pack(weight)
    assert (made.e4m3.shape, made.e4m3.dtype, made.scales.shape) == ((35, 256), E4M3, (35,))
    assert not made.e4m3.float()[:, 200:].any()
    again = made.e4m3.float()[:, :200] * made.scales[:, None]
    assert torch.equal(again, rounded(weight, 200))


def test_a_weight_is_packed_once_and_again_when_it_changes(monkeypatch):
    pytest.importorskip("triton")
    from deit.kernels.fp8 import triton as implementation

    calls, pack = [], implementation.pack
    monkeypatch.setattr(implementation, "pack", lambda w: calls.append(1) or pack(w))
    weight = torch.randn(32, 64)
    first = implementation.kept(weight)
    assert implementation.kept(weight) is first
    assert len(calls) == 1
    weight.mul_(2.0)
    assert torch.equal(implementation.kept(weight).scales, 2 * first.scales)
    weight.data = -4 * weight.clone()
    assert torch.equal(implementation.kept(weight).scales, 8 * first.scales)
    assert len(calls) == 3
    packing.forget(weight)


def test_schemas_have_a_reference_and_kernels():
    for name in ("fp8_linear", "fp8_gelu_mlp"):
        assert name in OPERATORS
        assert callable(getattr(reference, name))
        assert [i for i, kernels in registry.KERNELS.items() if name in kernels] == ["triton"]
        assert not any(name in prior.operators for prior in measured.TABLES)


def test_never_chosen_by_itself():
    assert explain("fp8_linear", X, WEIGHT, BIAS).chosen == "reference"
    found = explain("fp8_gelu_mlp", X, WEIGHT, BIAS, WEIGHT, BIAS)
    assert found.chosen == "reference"
    assert "no fp8_gelu_mlp kernel" in str(found)


def test_an_older_gpu_is_refused_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 6))
    asked = fp8._too_old.__wrapped__  # its answers are kept: ask past them
    assert asked("cuda", 0) == ("e4m3 products need compute capability 8.9, this GPU has 8.6",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 9))
    assert asked("cuda", 0) == ()


X, WEIGHT, BIAS = torch.randn(2, 5, 64), torch.randn(64, 64), torch.randn(64)
BAD = [
    (TypeError, "x: expected a floating", {"x": X.int()}),
    (TypeError, "weight: expected torch.float32", {"weight": WEIGHT.double()}),
    (ValueError, "weight: expected shape", {"weight": WEIGHT[:, :60]}),
    (ValueError, "weight: expected at least one output channel", {"weight": WEIGHT[:0]}),
    (ValueError, "depth", {"x": X[..., :0], "weight": WEIGHT[:, :0]}),
    (ValueError, "bias", {"bias": BIAS[:3]}),
    (ValueError, "activation", {"activation": "gelu_tanh"}),
    (ValueError, "activation", {"activation": "gelu", "gamma": BIAS}),
    (ValueError, "residual", {"residual": X[0]}),
    (TypeError, "norm", {"norm": BIAS}),
    (ValueError, "impl", {"impl": "fast"}),
    (NotImplementedError, "no fp8_linear kernel", {"impl": "cpu"}),
    (NotImplementedError, "Triton runs CPU tensors only in its interpreter", {"impl": "triton"}),
]


@pytest.mark.parametrize(("kind", "message", "changes"), BAD)
def test_bad_input(kind, message, changes):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS} | changes
    with pytest.raises(kind, match=message):
        fp8_linear(**arguments)


def test_a_gradient_is_refused():
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="fp8_linear: a tensor req"):
        fp8_linear(X, WEIGHT.clone().requires_grad_())
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="fp8_gelu_mlp"):
        fp8_gelu_mlp(X.clone().requires_grad_(), WEIGHT, None, WEIGHT, None)


@pytest.mark.parametrize("name", ["fp8_linear", "fp8_gelu_mlp"])
def test_fake_agrees_with_reference(name):
    products = (
        (WEIGHT[:30], BIAS[:30]) if name == "fp8_linear" else (WEIGHT, None, WEIGHT[:30], None)
    )
    arguments = OPERATORS[name].prepare(X, *products)
    real = getattr(reference, name)(*arguments)
    meta = registry.COMPILED["triton"][name](
        *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
    )
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
