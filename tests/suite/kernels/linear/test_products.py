"""The C++ matrix products against fp64: every instruction set, optional and tail."""

import pytest
import torch

from deit.kernels import explain, gelu_mlp, linear
from deit.kernels.engine import limits, native, registry
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.prove import oracle, reference

pytestmark = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)

OPS = registry.COMPILED["cpu"]
DTYPES = [torch.float32, torch.bfloat16]


def weights(width, depth, dtype, seed=1):
    weight = oracle.make("random", (width, depth), dtype, seed=seed, scale=depth**-0.5)
    return weight, oracle.make("random", (width,), dtype, seed=seed + 1)


def epilogue(kind, shape, dtype):
    """residual, gamma and keep: "none" of them, the "residual" alone, "all", or "fp32" ones."""
    if kind == "none":
        return None, None, None
    wide = torch.float32 if kind == "fp32" else dtype
    residual = oracle.make("random", shape, wide, seed=3)
    if kind == "residual":
        return residual, None, None
    gamma = oracle.make("random", shape[-1:], wide, seed=4)
    return residual, gamma, torch.tensor([0.0, 1.25, 1.5], dtype=wide)


@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("kind", ["none", "residual", "all", "fp32"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear(isa, family, kind, activation):
    for dtype in DTYPES:
        x = oracle.make(family, (3, 17, 96), dtype)
        arguments = (x, *weights(160, 96, dtype), activation)
        arguments += epilogue(kind, (3, 17, 160), dtype)
        before = None if arguments[4] is None else arguments[4].clone()
        oracle.check(OPS["linear"](*arguments), reference.linear, arguments)
        assert before is None or torch.equal(arguments[4], before)


# 256 words are one step of the sum, 258 and 770 have a rest; in bf16 a word is a pair.
@pytest.mark.parametrize("depth", [1, 2, 30, 33, 256, 258, 770])
def test_tails(isa, depth):
    for dtype in DTYPES:
        if depth % 2 and dtype == torch.bfloat16:
            continue
        x = oracle.make("random", (17, depth), dtype)
        weight, bias = weights(130, depth, dtype)
        residual = oracle.make("random", (17, 130), dtype, seed=5)
        arguments = (x, weight, bias, "gelu", residual, None, None)
        whole = OPS["linear"](*arguments)
        oracle.check(whole, reference.linear, arguments)
        # Parts of tiles in either direction compute the same bits.
        for rows in (1, 7, 8, 9):
            for width in (1, 7, 8, 14, 16, 24, 33, 48, 50):
                part = (x[:rows], weight[:width], bias[:width], "gelu", residual[:rows, :width])
                out = OPS["linear"](*part, None, None)
                assert torch.equal(out, whole[:rows, :width])


@pytest.mark.parametrize("depth", [193, 196, 224])
def test_steps_of_a_sum_are_even(isa, depth):
    """A chain of 192 and a short one had 1.4 times the error of PyTorch's two halves."""
    draws = []
    for seed in range(0, 60, 10):
        x = oracle.make("random", (300, depth), seed=seed)
        draws.append((x, weights(192, depth, torch.float32, seed + 1)[0], *[None] * 5))
    ((ours, theirs),) = oracle.check_draws(OPS["linear"], reference.linear, draws)
    assert ours.norm < 1.25 * theirs.norm


@pytest.mark.parametrize("kind", ["none", "residual", "all", "fp32"])
@pytest.mark.parametrize("tokens", [17, 300])  # 900 rows are more than the hidden layer is made for
def test_gelu_mlp(isa, kind, tokens):
    for dtype in DTYPES:
        x = oracle.make("random", (3, tokens, 64), dtype)
        arguments = (x, *weights(80, 64, dtype), *weights(64, 80, dtype, seed=5))
        arguments += epilogue(kind, (3, tokens, 64), dtype)
        oracle.check(OPS["gelu_mlp"](*arguments), reference.gelu_mlp, arguments)
        exact = OPS["gelu_mlp"](*arguments)
        assert torch.equal(OPS["gelu_mlp"](*arguments, "gelu"), exact)
        for activation in ACTIVATIONS[1:]:
            by_name = (*arguments, activation)
            oracle.check(OPS["gelu_mlp"](*by_name), reference.gelu_mlp, by_name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_deit_s_sizes(dtype):
    x = oracle.make("outlier", (5, 197, 384), dtype)
    arguments = (x, *weights(1536, 384, dtype), *weights(384, 1536, dtype, seed=5), x, None, None)
    oracle.check(OPS["gelu_mlp"](*arguments), reference.gelu_mlp, arguments)
    arguments = (x, *weights(1152, 384, dtype), None, None, None, None)
    oracle.check(OPS["linear"](*arguments), reference.linear, arguments)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_over_its_whole_range(isa, name):
    # A product with the identity is the activation alone. The error is relative to it.
    for low, high in ((-12.0, 12.0), (-0.01, 0.01), (-1e-30, 1e-30)):
        x = torch.linspace(low, high, 4097)[:, None]
        out = OPS["linear"](x, torch.ones(1, 1), None, name, None, None, None)
        arguments = (x, torch.ones(1, 1), None, name, None, None, None)
        oracle.check(out, reference.linear, arguments)
    edges = torch.tensor([[torch.inf], [-torch.inf], [3e38], [-3e38], [torch.nan], [0.0]])
    out = OPS["linear"](edges, torch.ones(1, 1), None, name, None, None, None).flatten()
    assert out[0] == torch.inf
    assert out[2] == 3e38
    assert out[1].abs() < 1e-30  # where PyTorch gives NaN
    assert out[3].abs() < 1e-30
    assert out[4].isnan()
    assert out[5] == 0.0


def test_nan_stays_in_its_row(isa):
    for dtype in DTYPES:
        x = oracle.make("random", (20, 64), dtype)
        x[7, 3] = torch.nan
        out = OPS["linear"](x, *weights(50, 64, dtype), "gelu", None, None, None)
        assert out.isnan().any(-1).nonzero().flatten().tolist() == [7]
        assert out[7].isnan().all()


def test_threads_change_no_bit(isa, threads):
    for dtype in DTYPES:
        x = oracle.make("random", (2, 197, 192), dtype)
        mlp = (x, *weights(400, 192, dtype), *weights(192, 400, dtype, seed=5), x, None, None)
        products = [
            (x, *weights(576, 192, dtype), None, None, None, None),
            (x, *weights(40, 192, dtype), "gelu", None, None, None),  # less than a panel
        ]
        threads(1)
        alone = [OPS["linear"](*each) for each in products] + [OPS["gelu_mlp"](*mlp)]
        for count in (2, 8):
            threads(count)
            found = [OPS["linear"](*each) for each in products] + [OPS["gelu_mlp"](*mlp)]
            assert all(map(torch.equal, alone, found))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_ranks(isa, dtype):
    x = oracle.make("random", (5, 4, 2, 32), dtype).transpose(0, 2)[:, 1:]
    weight = oracle.make("random", (32, 24), dtype).T
    bias = oracle.make("random", (48,), dtype, seed=1)[::2]
    residual = oracle.make("random", (24, 2, 3, 5), dtype).permute(1, 2, 3, 0)
    arguments = (x, weight, bias, None, residual, None, None)
    oracle.check(OPS["linear"](*arguments), reference.linear, arguments)
    arguments = (oracle.make("random", (32,), dtype, seed=2), weight, None, None, None, None, None)
    oracle.check(OPS["linear"](*arguments), reference.linear, arguments)


@torch.no_grad()
def test_a_changed_weight_is_seen_however_it_changed():
    # Nothing is kept of a weight, so even changes that no version counter tells are seen.
    x, weight = torch.randn(3, 64), torch.nn.Parameter(torch.randn(48, 64))
    for change in (
        lambda: weight.mul_(2.0),
        lambda: weight.data.add_(1.0),
        lambda: weight.numpy().fill(0.5),
        lambda: setattr(weight, "data", torch.randn(48, 64)),
    ):
        with torch.no_grad():
            linear(x, weight, impl="cpu")
            change()
            found = linear(x, weight, impl="cpu")
            assert torch.equal(found, linear(x, weight.detach().clone(), impl="cpu"))


def test_what_is_left_to_pytorch(monkeypatch):
    with torch.no_grad():
        half = explain("linear", torch.randn(2, 8).half(), torch.randn(4, 8).half())
        empty = explain("linear", torch.randn(0, 8), torch.randn(4, 8))
        odd = explain("linear", torch.randn(2, 7).bfloat16(), torch.randn(4, 7).bfloat16())
        monkeypatch.setattr(limits, "cpu_isa", lambda: "avx2")
        older = explain("linear", torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16())
        monkeypatch.setattr(limits, "cpu_isa", lambda: "portable")
        other = explain("gelu_mlp", torch.randn(2, 8), torch.randn(8, 8), None, torch.randn(8, 8),
                        None)  # fmt: skip
    for found in (half, empty, odd, older, other):
        assert found.chosen == "reference"
    assert "float16" in half.reasons["cpu"][0]
    assert "empty axis" in empty.reasons["cpu"][0]
    assert any("odd depth" in reason for reason in odd.reasons["cpu"])
    assert "AVX512-BF16" in older.reasons["cpu"][0]
    assert "AVX2" in other.reasons["cpu"][0]
    assert linear(torch.randn(0, 8), torch.randn(4, 8)).shape == (0, 4)


@torch.no_grad()
@pytest.mark.skipif(native.why_not("cpu") != () or native.cpu_isa() != "avx512_bf16",
                    reason="this processor has no AVX512-BF16")  # fmt: skip
def test_auto_takes_them():
    for dtype in DTYPES:
        x, (weight, bias) = torch.randn(2, 8).to(dtype), weights(8, 8, dtype)
        assert explain("linear", x, weight, bias).chosen == "cpu"
        assert explain("gelu_mlp", x, weight, bias, weight, bias).chosen == "cpu"
        out = gelu_mlp(x, weight, bias, weight, bias)
        assert torch.equal(out, gelu_mlp(x, weight, bias, weight, bias, impl="cpu"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["linear", "gelu_mlp"])
def test_opcheck(name, dtype):
    x = oracle.make("random", (3, 5, 96), dtype)
    rest = epilogue("fp32", (3, 5, 96), dtype)
    if name == "linear":
        inputs = (x, *weights(96, 96, dtype), "gelu", *rest)
    else:
        inputs = (x, *weights(64, 96, dtype), *weights(96, 64, dtype), *rest)
    torch.library.opcheck(OPS[name], inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: OPS["linear"](x, w[:, :7], None, None, None, None, None), "weight"),
        (lambda x, w: OPS["linear"](x, w, w[0, :3], None, None, None, None), "bias"),
        (lambda x, w: OPS["linear"](x, w, None, "relu", None, None, None), "activation"),
        (lambda x, w: OPS["linear"](x, w, None, None, x[:1, :4], None, None), "residual"),
        (lambda x, w: OPS["linear"](x.half(), w.half(), None, None, None, None, None), "x"),
        (lambda x, w: OPS["linear"](x, w.double(), None, None, None, None, None), "weight"),
        (lambda x, w: OPS["linear"](x[:, :0], w[:, :0], None, None, None, None, None), "depth"),
    ],
)
def test_a_raw_call_with_wrong_arguments_raises(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(2, 8), torch.ones(4, 8))
