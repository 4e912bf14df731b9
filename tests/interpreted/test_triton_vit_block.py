"""vit_block on Triton against the fp64 oracle, in the interpreter: whole, in parts, in chains."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from deit.kernels import explain, vit_block
from deit.kernels.device import chips, common, few_rows
from deit.kernels.engine import registry
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton_norm_linear as folded_implementation
from deit.kernels.linear import triton_row_stats as statistics
from deit.kernels.prove import oracle, reference
from deit.kernels.vit_block import triton as implementation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PANEL = {"panel": True, "by itself": False}  # the two forms of a LayerNorm


class Draw:
    """Tensors of one block, each from a seed of its own."""

    def __init__(self, dtype, *, stream=None, bias=True, gamma=False, dim=192, heads=3):
        self.dtype, self.stream = dtype, stream or dtype
        self.has_bias, self.has_gamma, self.dim, self.heads = bias, gamma, dim, heads
        self.seeds = itertools.count(1)

    def vector(self, size, dtype=None):
        return oracle.make("random", (size,), dtype or self.dtype, seed=next(self.seeds))

    def weight(self, out_features, in_features):
        shape, scale = (out_features, in_features), in_features**-0.5
        return oracle.make("random", shape, self.dtype, seed=next(self.seeds), scale=scale)

    def norm(self):
        bias = self.vector(self.dim, self.stream) if self.has_bias else None
        return 1 + 0.1 * self.vector(self.dim, self.stream), bias

    def linear(self, out_features, in_features):
        bias = self.vector(out_features) if self.has_bias else None
        return self.weight(out_features, in_features), bias

    def x(self, family, batch, tokens):
        shape = (batch, tokens, self.dim)
        return oracle.make(family, shape, self.stream, seed=next(self.seeds))

    def arguments(self, family, batch, tokens, row_stats=None, key_bias=None):
        """The schema's arguments, in order."""
        dim = self.dim
        gamma = lambda: self.vector(dim) if self.has_gamma else None
        attention = (*self.norm(), *self.linear(3 * dim, dim), *self.linear(dim, dim), gamma())
        mlp = (*self.norm(), *self.linear(4 * dim, dim), *self.linear(dim, 4 * dim), gamma())
        numbers = (self.heads, (dim // self.heads) ** -0.5, 1e-6)
        return (self.x(family, batch, tokens), row_stats, *attention, *mlp, key_bias, *numbers)


def panel(dim, by_panel=True):
    """A small configuration of the form in which LayerNorm is a prologue, or None."""
    return (
        linear_tiles.PanelConfig(32, 32, dim // 3, num_warps=4, num_stages=2) if by_panel else None
    )


@pytest.fixture(autouse=True)
def many_rows(monkeypatch):
    """The forms of many rows; few have the MLP in two products."""
    monkeypatch.setattr(gelu_mlp_tiles, "rows_class", lambda _: few_rows.MANY)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran, by name, in order."""
    names = []
    run = common.Launch.run
    record = lambda self, like: names.append(self.kernel.__name__) or run(self, like)
    monkeypatch.setattr(common.Launch, "run", record)
    return names


def check(arguments):
    out, row_stats = registry.COMPILED["triton"]["vit_block"](*arguments)
    oracle.check(out, lambda *a: reference.vit_block(*a)[0], arguments)
    torch.testing.assert_close(row_stats, reference.row_stats(out), rtol=1e-5, atol=1e-4)
    return out, row_stats


@pytest.mark.parametrize("stream", [None, torch.float32], ids=["", "fp32 stream"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_error_rule(family, dtype, stream):
    check(Draw(dtype, stream=stream).arguments(family, 3, 17))


@pytest.mark.parametrize("tokens", [1, 17, 197, 198])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_rows(batch, tokens):
    out, row_stats = check(Draw(torch.float16, dim=64, heads=1).arguments("random", batch, tokens))
    assert out.shape == (batch, tokens, 64)
    assert row_stats.shape == (batch, tokens, 2, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gamma", [True, False])
def test_options(gamma, bias, dtype):
    key_bias = torch.zeros(2, 9)
    key_bias[1, 4:] = float("-inf")
    draw = Draw(dtype, gamma=gamma, bias=bias, dim=64, heads=2)
    activation = "silu" if gamma else None
    check((*draw.arguments("random", 2, 9, key_bias=key_bias), activation))


@pytest.mark.parametrize(("dim", "heads"), [(32, 1), (96, 3), (160, 2), (384, 6)])
def test_widths(dim, heads):
    """A part that is not full, alone and after full ones; DeiT-S's width."""
    check(Draw(torch.float16, dim=dim, heads=heads).arguments("large_mean", 1, 5))


@pytest.mark.parametrize("by_panel", PANEL.values(), ids=PANEL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("stream", [None, torch.float32], ids=["", "fp32 stream"])
def test_folded_norm_is_as_accurate_as_pytorchs(stream, family, dtype, by_panel):
    """Without a residual beside it, whose own rounding hides LayerNorm's errors."""
    draw = Draw(dtype, stream=stream)
    x, (weight, bias), linear = draw.x(family, 2, 37), draw.norm(), draw.linear(128, 192)
    norm = statistics.Norm(None, weight, bias, 1e-6)
    got = implementation.norm_linear(x, norm, *linear, config=panel(192, by_panel))
    folded = lambda x, weight, bias, *linear: F.linear(
        reference.layer_norm(x, weight, bias, 1e-6).to(linear[0].dtype), *linear
    )
    oracle.check(got, folded, (x, weight, bias, *linear), name="norm_linear")


@pytest.mark.parametrize("by_panel", PANEL.values(), ids=PANEL)
@pytest.mark.parametrize("dim", [48, 96, 384])
def test_folded_norm_of_parts_that_are_not_full(dim, by_panel):
    """Their counts and eps decide here; beside a residual neither would show."""
    draw = Draw(torch.float32, dim=dim)
    x, norm, linear = draw.x("random", 1, 9), draw.norm(), draw.linear(16, dim)
    x[..., 64:] += 3.0
    given = statistics.Norm(statistics.row_stats(x), *norm, 0.5)
    got = implementation.norm_linear(x, given, *linear, config=panel(dim, by_panel))
    folded = lambda x, weight, bias, *linear: F.linear(
        reference.layer_norm(x, weight, bias, 0.5), *linear
    )
    oracle.check(got, folded, (x, *norm, *linear), name="norm_linear")


@pytest.mark.parametrize("by_panel", PANEL.values(), ids=PANEL)
@pytest.mark.parametrize("stream", [None, torch.float32], ids=["", "fp32 stream"])
def test_folded_norm_rounds_as_a_norm_in_memory(stream, by_panel):
    """What the product sees is LayerNorm's output to the bit, but for the order of sums."""
    draw = Draw(torch.float16, stream=stream, dim=96)
    x, (weight, bias) = draw.x("outlier", 2, 37), draw.norm()
    norm = statistics.Norm(statistics.row_stats(x), weight, bias, 1e-6)
    config = panel(96, by_panel)
    got = implementation.norm_linear(x, norm, torch.eye(96).half(), None, config=config)
    assert got.dtype == torch.float16
    want = reference.layer_norm(x.float(), weight.float(), bias.float(), 1e-6).half()
    assert (got != want).float().mean() < 0.01  # ties that an ulp of fp32 decides


@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("dim", [1, 63, 64, 65, 192, 1000])
def test_row_stats(dim, family):
    x = oracle.make(family, (3, 7, dim))
    got, exact = statistics.row_stats(x), reference.row_stats(x.double())
    assert got.shape == (3, 7, 2, -(-dim // 64))
    plain = reference.row_stats(x)
    for index in range(2):
        ours = (got[..., index, :].double() - exact[..., index, :]).abs().max()
        theirs = (plain[..., index, :].double() - exact[..., index, :]).abs().max()
        assert ours <= 1.25 * theirs + 1e-6 * exact[..., index, :].abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_hands_its_statistics_on(dtype):
    """Statistics from the epilogue of the block before, or from rows in memory: the same norm."""
    first, second = (Draw(dtype) for _ in range(2))
    x, row_stats = check(first.arguments("large_mean", 2, 17))
    _, _, *rest = second.arguments("random", 2, 17)
    chained = registry.COMPILED["triton"]["vit_block"](x, row_stats, *rest)
    alone = registry.COMPILED["triton"]["vit_block"](x, None, *rest)
    torch.testing.assert_close(chained[0], alone[0], rtol=1e-5, atol=1e-4)
    oracle.check(chained[0], lambda *a: reference.vit_block(*a)[0], (x, None, *rest))


@pytest.mark.parametrize("given", [True, False], ids=["statistics given", "not given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_statistics_in_vain(dtype, given, launched):
    """Those of an input are computed where a panel reads them, and nowhere given twice."""
    by_panel = dtype != torch.float32  # D = 192; in fp32 no architecture has one
    x, _, *rest = Draw(dtype).arguments("random", 1, 5)
    check((x, reference.row_stats(x) if given else None, *rest))
    own = ["_layer_norm_kernel", "_linear_kernel"]
    first = [*([] if given else ["_row_stats_kernel"]), "_panel_kernel"] if by_panel else own
    mlp = ["_gelu_mlp_kernel"] if by_panel else [*own, "_linear_kernel"]
    assert launched == [*first, "_online_kernel", "_linear_kernel", *mlp]


def test_only_statistics_that_are_read_are_written(monkeypatch):
    """In a block whose LayerNorms are kernels of their own: those that it returns."""
    written = []
    empty = statistics.empty
    monkeypatch.setattr(statistics, "empty", lambda x: written.append(x.shape) or empty(x))
    check(Draw(torch.float16, dim=64, heads=2).arguments("random", 1, 5))
    assert len(written) == 1


def test_given_statistics_are_read():
    """Or the test above would pass without them."""
    arguments = list(Draw(torch.float16).arguments("random", 1, 5))
    want, _ = registry.COMPILED["triton"]["vit_block"](*arguments)
    arguments[1] = reference.row_stats(2 * arguments[0])
    got, _ = registry.COMPILED["triton"]["vit_block"](*arguments)
    assert not torch.allclose(got, want, atol=1e-2)


def test_the_same_bits_again():
    arguments = Draw(torch.float16).arguments("outlier", 2, 70)
    first, again = (registry.COMPILED["triton"]["vit_block"](*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


STRIDES = {
    "tokens after the first": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "batch and tokens swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows of odd length": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
    "last axis strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", STRIDES)
def test_strides(layout):
    x, *rest = Draw(torch.float16, dim=64, heads=2).arguments("random", 3, 9)
    arranged = STRIDES[layout](x)
    assert torch.equal(arranged, x)
    check((arranged, *rest))


@pytest.mark.parametrize(
    ("single", "activation"),
    [(True, "quick_gelu"), (None, "gelu_tanh"), (False, "silu")],
    ids=["one kernel", "panel", "by itself"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_forms_of_the_mlp(dtype, single, activation):
    draw = Draw(dtype)
    x, norm, mlp = draw.x("large_mean", 2, 70), draw.norm(), (*draw.linear(768, 192),)
    mlp += (*draw.linear(192, 768), draw.vector(192))
    given = statistics.Norm(statistics.row_stats(x), *norm, 1e-6)
    config = gelu_mlp_tiles.MlpConfig(64, 64, 64, tma=True, num_warps=4, num_stages=2)
    config = config if single else panel(192, by_panel=single is None)
    got, _ = implementation.norm_mlp(x, given, *mlp, activation, config=config)
    want = lambda x, weight, bias, w1, b1, w2, b2, gamma: reference.gelu_mlp(
        reference.layer_norm(x, weight, bias, 1e-6), w1, b1, w2, b2, x, gamma, None, activation
    )
    oracle.check(got, want, (x, *norm, *mlp), name="norm_mlp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_panel_split_among_programs(activation, batch, dtype):
    """More panels than programs, and so few that their columns are split among programs."""
    draw = Draw(dtype, dim=48)
    x, norm, linear = draw.x("large_mean", batch, 17), draw.norm(), draw.linear(200, 48)
    given = statistics.Norm(statistics.row_stats(x), *norm, 1e-6)
    config = panel(48)
    assert folded_implementation.splits(-(-batch * 17 // 32), 7, 3) == (3 if batch == 1 else 2)
    got = folded_implementation.norm_linear(x, given, *linear, activation, config=config)
    want = lambda x, weight, bias, *linear: reference.linear(
        reference.layer_norm(x, weight, bias, 1e-6), *linear, activation, None, None, None
    )
    oracle.check(got, want, (x, *norm, *linear), name="norm_panel")


@pytest.mark.parametrize("arch", chips.SHARED_MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_architectures_panel(arch, dtype):
    config = linear_tiles.norm_panel(arch, dtype, 576, 192)
    if config is None:
        pytest.skip("has none")
    draw = Draw(dtype)
    x, (weight, bias), linear = draw.x("random", 1, 70), draw.norm(), draw.linear(576, 192)
    norm = statistics.Norm(statistics.row_stats(x), weight, bias, 1e-6)
    got = implementation.norm_linear(x, norm, *linear, config=config)
    folded = lambda x, weight, bias, *linear: F.linear(
        reference.layer_norm(x, weight, bias, 1e-6), *linear
    )
    oracle.check(got, folded, (x, weight, bias, *linear), name="norm_panel")


def public(dtype=torch.float16, dim=64, heads=2):
    """(args, kwargs) of the public function."""
    x, stats, *tensors, heads, scale, eps = Draw(dtype, dim=dim, heads=heads, gamma=True).arguments(
        "random", 2, 5
    )
    gamma1, gamma2, key_bias = tensors[6], tensors[13], tensors[14]
    args = (x, *tensors[:6], *tensors[7:13], heads)
    return args, {"scale": scale, "eps": eps, "gamma1": gamma1, "gamma2": gamma2,
                  "key_bias": key_bias, "row_stats": stats}  # fmt: skip


def test_opcheck():
    arguments = Draw(torch.float32, dim=64, heads=2, gamma=True).arguments(
        "random", 2, 5, key_bias=torch.zeros(2, 5)
    )
    for given in (arguments, (arguments[0], reference.row_stats(arguments[0]), *arguments[2:])):
        checks = torch.library.opcheck(registry.COMPILED["triton"]["vit_block"], given)
        assert set(checks.values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break():
    args, kwargs = public()

    def chain(x, *rest):
        x, row_stats = vit_block(x, *rest, **kwargs, impl="triton")
        return vit_block(x, *rest, **kwargs | {"row_stats": row_stats}, impl="triton")[0]

    got = torch.compile(chain, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(got, chain(*args))


def test_a_gradient_is_refused_by_name_and_right_by_auto():
    args, kwargs = public(torch.float32)
    x = args[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="the kernel is forward-only"):
        vit_block(*args, **kwargs, impl="triton")
    vit_block(*args, **kwargs)[0].square().sum().backward()
    assert x.grad.abs().max() > 0
    with torch.no_grad():
        vit_block(*args, **kwargs, impl="triton")


def test_a_head_that_attention_has_no_kernel_for():
    assert explain("vit_block", *public(dim=66, heads=3)[0]).reasons["triton"] == [
        "head dimension 22 (served: (32, 64, 80, 96, 128))"
    ]
