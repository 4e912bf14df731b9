"""Products in 8-bit integers: kernels against the quantised reference, that against fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INT8_SETS

from deit.kernels import explain, gelu_mlp, int8_gelu_mlp, int8_linear, linear
from deit.kernels.engine import native, packing
from deit.kernels.int8 import cpu as int8_cpu
from deit.kernels.int8 import quantize
from deit.kernels.prove import oracle

needs_library = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)


@pytest.fixture(params=INT8_SETS)
def isa(request):
    """Each instruction set in turn; the best one again afterwards."""
    if native.why_not("cpu"):
        pytest.skip("; ".join(native.why_not("cpu")))
    try:
        native.select_cpu_int8_isa(request.param)
    except (ValueError, RuntimeError) as error:
        pytest.skip(str(error))
    yield request.param
    native.select_cpu_int8_isa(None)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def layer(depth, width, seed=1):
    weight = oracle.make("random", (width, depth), seed=seed, scale=depth**-0.5)
    return weight, oracle.make("random", (width,), seed=seed + 1)


def norm_of(depth, seed=7):
    draw = lambda s: oracle.make("random", (depth,), seed=s)
    return 1 + 0.1 * draw(seed), 0.1 * draw(seed + 1), 1e-6


def agree(out, expected):
    """All but a few elements agree to the last bits, and the rest to a step of a token's scale.

    An ulp of difference before the rounding (LayerNorm's and GELU's own) can flip one integer.
    """
    difference = (out - expected).abs()
    exact = difference <= 4e-6 * expected.abs().max()
    rows = (~exact).flatten(0, -2).any(-1).float().mean()
    assert rows <= 0.03, f"{rows:.1%} of the rows differ"
    assert difference.norm() <= 5e-4 * expected.norm()


def to_the_last_bits(out, expected):
    assert (out - expected).abs().max() <= 4e-7 * expected.abs().max()


# 1, 3, 5 leave a rest in every tile; 192 and 576 are DeiT-Ti's; 70 is two panels and 6 channels;
# 1024 would put every row into one set of the cache; 17 and 43 rows are no multiple of a tile.
@pytest.mark.parametrize(
    ("rows", "depth", "width"),
    [(1, 1, 1), (5, 7, 3), (17, 100, 70), (43, 192, 576), (14, 1024, 33), (230, 64, 32)],
)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_linear_is_the_integer_arithmetic(isa, family, rows, depth, width):
    x = oracle.make(family, (rows, depth), mean=100.0)
    weight, bias = layer(depth, width)
    out = int8_linear(x, weight, bias, impl="cpu")
    to_the_last_bits(out, int8_linear(x, weight, bias, impl="reference"))
    residual, gamma = oracle.make("random", (rows, width), seed=5), bias.flip(0)
    out = int8_linear(x, weight, None, residual=residual, gamma=gamma, impl="cpu")
    expected = int8_linear(x, weight, None, residual=residual, gamma=gamma, impl="reference")
    assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_whole_numbers_are_exact(isa):
    # The ranges 0..255 and -127..127 make all scales 1, so fp32 results are the integers' own.
    x = torch.randint(0, 256, (29, 192)).float()
    x[:, 0], x[:, 1] = 255, 0
    weight = torch.randint(-127, 128, (96, 192)).float()
    weight[:, 5] = 127
    assert torch.equal(int8_linear(x, weight, impl="cpu"), x @ weight.T)
    signed = x - 100  # the zero point at work
    assert torch.equal(int8_linear(signed, weight, impl="cpu"), signed @ weight.T)


def test_the_largest_sum_fits(isa):
    depth = 65536
    x, weight = torch.full((2, depth), 255.0), torch.full((2, depth), 127.0)
    weight[1] = -127.0
    x[1, ::2] = 0.0
    expected = (x.double() @ weight.double().T).float()
    assert torch.equal(int8_linear(x, weight, impl="cpu"), expected)


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_norm_and_gelu(isa, family):
    # The reference's LayerNorm is PyTorch's. A mean of 1000 costs it 1e-4: enough to flip integers.
    x = oracle.make(family, (3, 37, 192), mean=8.0)
    weight, bias = layer(192, 130)
    for options in (
        {"norm": norm_of(192)},
        {"norm": (*norm_of(192)[:1], None, 1e-5)},
        {"activation": "gelu"},
        {"norm": norm_of(192), "activation": "gelu"},
        {"norm": norm_of(192), "residual": oracle.make("random", (3, 37, 130), seed=3)},
    ):
        out = int8_linear(x, weight, bias, impl="cpu", **options)
        agree(out, int8_linear(x, weight, bias, impl="reference", **options))


@pytest.mark.parametrize(("depth", "hidden"), [(192, 768), (64, 100), (7, 33)])
def test_mlp(isa, depth, hidden):
    x = oracle.make("random", (2, 83, depth))
    w1, b1 = layer(depth, hidden)
    w2, b2 = layer(hidden, depth, seed=3)
    for options in ({}, {"norm": norm_of(depth), "residual": x, "gamma": b2.flip(0)}):
        out = int8_gelu_mlp(x, w1, b1, w2, b2, impl="cpu", **options)
        agree(out, int8_gelu_mlp(x, w1, b1, w2, b2, impl="reference", **options))


def test_gelu_is_exact_to_3e_6(isa):
    # Rows of 255 u with u = 0..255: through a weight of 1 the product gives k * step exactly.
    steps = torch.arange(-1280, 1280).view(-1, 1) / 128.0  # one element a token: range and value
    one = torch.ones(1, 1)
    out = int8_linear(steps, one, activation="gelu", impl="cpu")
    plain = int8_linear(steps, one, impl="cpu")
    assert (out - F.gelu(plain.double())).abs().max() < 3e-6


# Rounding alone costs these inputs 43.4 dB (a token) and 42.8 (a channel), so 40.1 together; the
# bias carries as much signal as the product, hence 3 dB more. Measured: 43.1 (linear), 41.3 (MLP).
def test_signal_to_noise_against_fp64():
    x = oracle.make("random", (197, 384))
    w1, b1 = layer(384, 1536)
    w2, b2 = layer(1536, 384, seed=3)
    impl = "reference" if native.why_not("cpu") else "cpu"
    pairs = {
        42.5: (int8_linear(x, w1, b1, impl=impl), linear, (x, w1, b1)),
        40.8: (int8_gelu_mlp(x, w1, b1, w2, b2, impl=impl), gelu_mlp, (x, w1, b1, w2, b2)),
    }
    for decibels, (out, plain, arguments) in pairs.items():
        exact = plain(*oracle.in_fp64(arguments), impl="reference")
        sqnr = 20 * math.log10(exact.norm() / (out - exact).norm())
        assert sqnr >= decibels, f"{plain.__name__}: {sqnr:.1f} dB"


def test_activations_use_all_levels():
    """GELU's outputs are one-sided: a symmetric range would waste half of the levels."""
    x = F.gelu(oracle.make("random", (64, 768), scale=2.0))
    integers, zero, scales = quantize.quantize_tokens(x)
    assert integers.amax() == 255
    assert integers.amin() == 0
    assert (scales * (integers - zero) - x).abs().max() <= scales.max() * 1.001
    assert zero.max() < 20


@needs_library
def test_packed_layout():
    weight = torch.arange(-100, 110).view(35, 6).float()
    integers, scales = quantize.quantize_channels(weight)
    kept = int8_cpu.pack(weight)
    assert kept.packed.shape == (2, 2, 32, 4)
    flat = kept.packed.transpose(1, 2).reshape(64, 8)
    assert torch.equal(flat[:35, :6], integers)
    assert not flat[35:].any()
    assert not flat[:, 6:].any()
    assert torch.equal(kept.sums[:35], integers.sum(1, dtype=torch.int32))
    assert torch.equal(kept.scales, scales)


@needs_library
def test_a_changed_weight_is_seen():
    x, (weight, _) = torch.randn(4, 64), layer(64, 32)
    before = int8_linear(x, weight, impl="cpu")
    weight.mul_(2.0)
    to_the_last_bits(int8_linear(x, weight, impl="cpu"), 2 * before)
    weight.data = -weight.clone()
    to_the_last_bits(int8_linear(x, weight, impl="cpu"), -2 * before)


@needs_library
def test_a_weight_is_packed_once():
    calls = []
    weight = torch.randn(32, 64)
    x = torch.randn(4, 64)
    original, int8_cpu.pack = int8_cpu.pack, lambda w: calls.append(1) or original(w)
    try:
        for _ in range(3):
            int8_linear(x, weight, impl="cpu")
    finally:
        int8_cpu.pack = original
        packing.forget(weight)
    assert len(calls) == 1


def test_rows_that_are_not_finite_are_nan(isa):
    x = oracle.make("random", (20, 192))
    x[3, 191], x[7, 0], x[11, 5] = torch.nan, torch.inf, -torch.inf
    x[13] = 0.0
    x[15] *= 1e-42  # denormal
    weight, bias = layer(192, 40)
    for call in (
        lambda: int8_linear(x, weight, bias, impl="cpu"),
        lambda: int8_gelu_mlp(x, weight, bias, weight.T.contiguous(), None, impl="cpu"),
    ):
        out = call()
        assert out[[3, 7, 11]].isnan().all()
        rest = [i for i in range(20) if i not in (3, 7, 11)]
        assert out[rest].isfinite().all()
    assert torch.equal(int8_linear(x, weight, bias, impl="cpu")[13], bias)
    broken = weight.clone()
    broken[5, 6] = torch.nan
    out = int8_linear(x[:3], broken, bias, impl="cpu")
    assert out[:, 5].isnan().all()
    assert out[:, :5].isfinite().all()


def test_strides(isa):
    wide = oracle.make("random", (6, 9, 203))
    weight, bias = layer(100, 64)
    residual = oracle.make("random", (9, 6, 130), seed=3).transpose(0, 1)[..., 1:65]
    for x in (wide[:, :, 3:103], wide[:, :, ::2][..., :100], wide.transpose(0, 1)[..., :100]):
        other = residual if x.shape[0] == 6 else residual.transpose(0, 1)
        out = int8_linear(x, weight, bias, residual=other, impl="cpu")
        expected = int8_linear(
            x.contiguous(), weight, bias, residual=other.contiguous(), impl="cpu"
        )
        assert torch.equal(out, expected)
    rows = wide[:, :2, :100]
    assert torch.equal(
        int8_linear(rows, weight.T.contiguous().T, bias, impl="cpu"),
        int8_linear(rows.contiguous(), weight, bias, impl="cpu"),
    )


@needs_library
def test_empty_and_vectors():
    weight, bias = layer(64, 40)
    assert int8_linear(torch.empty(0, 5, 64), weight, bias, impl="cpu").shape == (0, 5, 40)
    x = torch.randn(64)
    assert torch.equal(
        int8_linear(x, weight, bias, impl="cpu"), int8_linear(x[None], weight, bias, impl="cpu")[0]
    )


def test_threads_change_no_bit(isa):
    x = oracle.make("random", (4, 197, 192))
    w1, b1 = layer(192, 768)
    w2, b2 = layer(768, 192, seed=3)
    calls = [
        lambda: int8_linear(x, w1, b1, norm=norm_of(192), impl="cpu"),
        lambda: int8_gelu_mlp(x, w1, b1, w2, b2, norm=norm_of(192), residual=x, impl="cpu"),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [call() for call in calls]
        for count in (2, 8):
            torch.set_num_threads(count)
            assert all(torch.equal(a, call()) for a, call in zip(alone, calls, strict=True))
    finally:
        torch.set_num_threads(before)
    # Nor does what else is in the batch.
    row = calls[0]()[2, 11]
    assert torch.equal(row, int8_linear(x[2, 11:12], w1, b1, norm=norm_of(192), impl="cpu")[0])


X, WEIGHT, BIAS = torch.randn(2, 5, 64), torch.randn(64, 64), torch.randn(64)
BAD = [
    (TypeError, "x", {"x": X.int()}),
    (TypeError, "weight", {"weight": WEIGHT.double()}),
    (ValueError, "weight", {"weight": WEIGHT[:, :60]}),
    (ValueError, "weight", {"weight": WEIGHT[:0]}),
    (ValueError, "depth", {"x": X[..., :0], "weight": WEIGHT[:, :0]}),
    (ValueError, "bias", {"bias": BIAS[:3]}),
    (ValueError, "activation", {"activation": "gelu_tanh"}),
    (ValueError, "activation", {"activation": "gelu", "residual": X}),
    (ValueError, "residual", {"residual": X[0]}),
    (ValueError, "gamma", {"gamma": BIAS[:5]}),
    (TypeError, "norm", {"norm": BIAS}),
    (ValueError, "norm's weight", {"norm": (BIAS[:5], None, 1e-6)}),
    (ValueError, "impl", {"impl": "fast"}),
    (NotImplementedError, "no int8_linear kernel", {"impl": "triton"}),
    (NotImplementedError, "fp32 only", {k: t.bfloat16() for k, t in
                                        {"x": X, "weight": WEIGHT, "bias": BIAS}.items()}
     | {"impl": "cpu"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "changes"), BAD)
def test_bad_input(kind, message, changes):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS} | changes
    with pytest.raises(kind, match=message):
        int8_linear(**arguments)


def test_a_gradient_is_refused():
    with torch.enable_grad(), pytest.raises(NotImplementedError, match=r"no_grad|inference_mode"):
        int8_linear(X, WEIGHT.clone().requires_grad_())
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="int8_gelu_mlp"):
        int8_gelu_mlp(X.clone().requires_grad_(), WEIGHT, None, WEIGHT, None)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(NotImplementedError, match="int8_linear: a tensor has a forward-mode"):
            int8_linear(dual, WEIGHT)
    with pytest.raises(NotImplementedError, match="rounding to 8 bits has no derivative"):
        torch.func.jvp(lambda w: int8_gelu_mlp(X, w, None, WEIGHT, None), (WEIGHT,), (WEIGHT,))


@needs_library
def test_explain_and_registration():
    found = explain("int8_linear", X, WEIGHT, BIAS)
    assert found.chosen == "cpu"
    assert "no int8_linear kernel" in str(found)
    ops = torch.ops.deit_cpu
    norm = (BIAS, BIAS, 1e-6)
    torch.library.opcheck(ops.int8_linear.default, (X, WEIGHT, BIAS, *norm, False, X, BIAS))
    mlp = (X, WEIGHT, BIAS, WEIGHT, BIAS, *norm, X, BIAS)
    torch.library.opcheck(ops.int8_gelu_mlp.default, mlp)
    kept = int8_cpu.pack(WEIGHT)
    torch.library.opcheck(ops.int8_linear_packed.default, (X, *kept, BIAS, *norm, False, X, BIAS))
    with pytest.raises(RuntimeError, match="packed"):
        ops.int8_linear_packed(X[..., :60], *kept, BIAS, None, None, 0.0, False, None, None)


def test_half_precision_takes_the_reference():
    x, weight = X.bfloat16(), WEIGHT.bfloat16()
    assert explain("int8_linear", x, weight).chosen == "reference"
    assert int8_linear(x, weight).dtype == torch.bfloat16


@needs_library
def test_selecting_an_instruction_set():
    best = native.cpu_int8_isa()
    assert best in INT8_SETS
    with pytest.raises(ValueError, match="neon9"):
        native.select_cpu_int8_isa("neon9")
    native.select_cpu_int8_isa("portable")
    assert native.cpu_int8_isa() == "portable"
    native.select_cpu_int8_isa(None)
    assert native.cpu_int8_isa() == best
