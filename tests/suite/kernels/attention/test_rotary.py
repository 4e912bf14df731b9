"""rotary_attention: what it computes, its C++ kernels by the error rule, and bad input."""

from __future__ import annotations

import pytest
import torch

from deit.kernels import attention, explain, rotary_attention
from deit.kernels.engine import native, registry
from deit.kernels.prove import oracle, reference

OPS = registry.COMPILED["cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NATIVE = pytest.mark.skipif(bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu")))


def call(tokens, heads=2, head_dim=64, prefix=1, interleaved=False, dtype=torch.float32, seed=0,
         family="random", per_head=False, batch=2):  # fmt: skip
    """The schema's arguments. The two tables are halves of one, as models keep them, and do not
    agree on the channels of a pair: no kernel may assume that."""
    qkv = oracle.packed(family, batch, tokens, heads, head_dim, dtype, seed=100 * seed + 1)
    shape = (heads, tokens - prefix, head_dim)[not per_head :]
    angles = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tables = torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)
    sin, cos = tables.chunk(2, dim=-1)
    return qkv, heads, head_dim**-0.5, sin, cos, prefix, interleaved


def public(arguments, impl):
    qkv, heads, scale, sin, cos, prefix, interleaved = arguments
    return rotary_attention(
        qkv, heads, sin, cos, prefix=prefix, interleaved=interleaved, scale=scale, impl=impl
    )


def gradients(dout, qkv, *rest):
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        reference.rotary_attention(leaf, *rest).backward(dout)
    return leaf.grad.chunk(3, dim=-1)


def differentiated(dout, qkv, *rest):
    out, lse = OPS["rotary_attention_fwd"](qkv, *rest)
    return OPS["rotary_attention_bwd"](dout, qkv, out, lse, *rest).chunk(3, dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_a_product_of_complex_numbers(interleaved):
    """Where a pair's channels have one angle, it turns by that angle (arXiv 2104.09864, eq. 13)."""
    heads, d, prefix, tokens = 2, 8, 2, 5
    qkv = torch.randn(1, tokens, 3 * heads * d, dtype=torch.float64)
    angles = torch.randn(tokens - prefix, d // 2, dtype=torch.float64)
    spread = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2)
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(x):  # [1, N, H * d]
        x = x.view(1, tokens, heads, d).transpose(1, 2)
        pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
        z = torch.view_as_complex(pairs.contiguous())
        z = torch.cat([z[:, :, :prefix], z[:, :, prefix:] * turn], dim=2)
        pairs = torch.view_as_real(z)
        x = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
        return x.transpose(1, 2).flatten(2)

    q, k, v = qkv.chunk(3, dim=-1)
    want = attention(torch.cat([turned(q), turned(k), v], dim=-1), heads)
    options = {"prefix": prefix, "interleaved": interleaved}
    found = rotary_attention(qkv, heads, spread.sin(), spread.cos(), **options)
    torch.testing.assert_close(found, want)
    again = attention(qkv, heads, rope=(spread.sin(), spread.cos()), **options)
    assert torch.equal(again, found)


@NATIVE
@pytest.mark.parametrize("family", ["random", "outlier", "one_hot"])
@pytest.mark.parametrize(("tokens", "prefix"), [(2, 1), (17, 0), (64, 5), (201, 5)])
def test_error_rule(isa, tokens, prefix, family):
    for dtype in DTYPES:
        draws = 24 if tokens < 20 else 4
        given = [
            call(tokens, 2, 64, prefix, bool(i % 2), dtype, i, family, per_head=i % 4 > 1)
            for i in range(draws)
        ]
        oracle.check_draws(OPS["rotary_attention"], reference.rotary_attention, given)


@NATIVE
@pytest.mark.parametrize("head_dim", [2, 8, 18, 20, 48, 80, 96, 128])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_even_head_dimension(isa, head_dim, interleaved):
    for dtype in DTYPES:
        given = [call(50, 2, head_dim, 3, interleaved, dtype, seed) for seed in range(8)]
        oracle.check_draws(OPS["rotary_attention"], reference.rotary_attention, given)


@NATIVE
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(base_isa, head_dim, interleaved):
    for dtype in DTYPES:
        draws = []
        for seed in range(6):
            given = call(70, 2, head_dim, 3, interleaved, dtype, seed, per_head=seed % 2 > 0)
            dout = oracle.make("random", (2, 70, 2 * head_dim), dtype, seed=seed + 9)
            draws.append((dout, *given))
        oracle.check_draws(differentiated, gradients, draws)


@NATIVE
def test_tiles_of_queries_and_threads_change_nothing(isa, threads):
    """More queries than a tile has: a tile's first token is not the table's."""
    given = call(230, 3, 64, 5, True)
    dout = torch.randn(2, 230, 192)
    found = []
    for count in (1, 3):
        threads(count)
        found.append((OPS["rotary_attention"](*given), *differentiated(dout, *given)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    oracle.check(found[0][1:], gradients, (dout, *given))


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefix_is_left_alone(isa, dtype):
    qkv, heads, scale, sin, cos, _, _ = call(9, prefix=4, dtype=dtype)
    plain = OPS["attention"](qkv, heads, scale, None)
    none = sin[:0]
    assert torch.equal(OPS["rotary_attention"](qkv, heads, scale, none, none, 9, False), plain)
    turned = [torch.zeros_like(sin), torch.ones_like(cos), 4, True]
    found = OPS["rotary_attention"](qkv, heads, scale, *turned)
    # Without positions bf16 is multiplied in bf16, probabilities rounded.
    loose = {"rtol": 1.6e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, plain, **loose)
    # Infinite pairs times a sine of 0 would be NaN: a prefix is not turned by an angle of 0.
    qkv[:, 0, 1] = torch.inf
    qkv[:, 0, 128:256] = 0
    found = OPS["rotary_attention"](qkv, heads, scale, sin, cos, 4, True)
    assert found[:, 1:].isfinite().all()


@NATIVE
def test_tables_of_any_strides():
    qkv, heads, scale, sin, cos, prefix, _ = call(20, per_head=True)
    want = OPS["rotary_attention"](qkv, heads, scale, sin, cos, prefix, True)
    for change in (
        lambda t: t.contiguous(),
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    ):
        for tables in ((change(sin), change(cos)), (change(sin), cos)):
            found = OPS["rotary_attention"](qkv, heads, scale, *tables, prefix, True)
            assert torch.equal(found, want)


@NATIVE
def test_half_precision_takes_fp32_tables(isa):
    for dtype in DTYPES[1:]:
        qkv, heads, scale, sin, cos, prefix, _ = call(40, dtype=dtype)
        given = (qkv, heads, scale, sin.float(), cos.float(), prefix, False)
        oracle.check(OPS["rotary_attention"](*given), reference.rotary_attention, given)


def test_learned_angles_have_their_gradient():
    """Kernels have none for the tables: "auto" runs what has, and a kernel by name says so."""
    qkv, heads, _, sin, cos, prefix, _ = call(9)
    angles = torch.randn(sin.shape, requires_grad=True)
    out = rotary_attention(qkv, heads, angles.sin(), angles.cos(), prefix=prefix)
    (found,) = torch.autograd.grad(out.square().sum(), angles)
    assert found.abs().min() > 0
    if not native.why_not("cpu"):
        with pytest.raises(NotImplementedError, match="sin requires grad"):
            rotary_attention(qkv, heads, angles.sin(), cos, prefix=prefix, impl="cpu")


def test_autocast_casts_the_projection_alone():
    given = call(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = public(given, "auto")
    assert found.dtype == torch.bfloat16
    rest = (given[0].bfloat16(), *given[1:])
    torch.testing.assert_close(found, public(rest, "auto"))


def test_explained_as_what_serves_the_call():
    qkv, heads, _, sin, cos, prefix, _ = call(9)
    found = explain("attention", qkv, heads, rope=(sin, cos), prefix=prefix)
    assert found.operator == "rotary_attention"
    assert explain("attention", qkv, heads).operator == "attention"


def test_without_positions_nothing_is_passed_for_them():
    names = [argument.name for argument in OPS["attention"]._schema.arguments]
    assert names == ["qkv", "num_heads", "scale", "key_bias"]


QKV, SIN = torch.randn(2, 6, 3 * 2 * 8), torch.randn(5, 8)
BAD = {
    "a table of the wrong length": ({"rope": (SIN[1:], SIN[1:])}, ValueError, r"sin: .*\(5, 8\)"),
    "tables that differ": ({"rope": (SIN, SIN[1:])}, ValueError, "cos: expected shape"),
    "half of a head": ({"rope": (SIN[:, :4], SIN[:, :4])}, ValueError, "sin: expected shape"),
    "tables by too many heads": (
        {"rope": (SIN.expand(3, 5, 8), SIN.expand(3, 5, 8))}, ValueError, r"sin: .*\(2, 5, 8\)"),
    "another dtype": ({"rope": (SIN.double(), SIN.double())}, TypeError, "sin: expected"),
    "a padded key": (
        {"rope": (SIN, SIN), "key_bias": torch.zeros(2, 6)}, ValueError, "rope: .* key_bias"),
    "one tensor": ({"rope": SIN}, TypeError, "rope: expected a pair"),
    "no tensors": ({"rope": (None, SIN)}, TypeError, "sin: expected a Tensor"),
    "a prefix beyond the tokens": ({"rope": (SIN, SIN), "prefix": 7}, ValueError, "prefix: .*7"),
    "a negative prefix": ({"rope": (SIN, SIN), "prefix": -1}, ValueError, "prefix: .*-1"),
    "a fraction": ({"rope": (SIN, SIN), "prefix": 1.0}, ValueError, "prefix: .*1.0"),
    "a word": ({"rope": (SIN, SIN), "interleaved": "yes"}, TypeError, "interleaved: .*str"),
    "a prefix of nothing": ({"rope": None, "prefix": 1}, ValueError, "rope: expected"),
    "an odd head": ({"rope": (SIN, SIN), "num_heads": 16}, ValueError, "qkv: .*even.*got 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_bad_input_is_named(name, impl):
    changed, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        attention(**{"qkv": QKV, "num_heads": 2, "prefix": 1} | changed, impl=impl)
