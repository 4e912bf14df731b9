"""cross_attention: what it computes, its C++ kernel by the error rule, gradients and bad input."""

from __future__ import annotations

import pytest
import torch

from deit.kernels import attention, cross_attention, explain
from deit.kernels.engine import native, registry
from deit.kernels.prove import oracle, reference

OPS = registry.COMPILED["cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NATIVE = pytest.mark.skipif(bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu")))


def call(queries, tokens, dtype=torch.float32, family="random", batch=2, heads=2, dim=64, seed=0):
    """The schema's arguments: both tensors are views of one projection."""
    qkv = oracle.packed(family, batch, max(queries, tokens), heads, dim, dtype, seed=100 * seed + 1)
    width = heads * dim
    return qkv[:, :queries, :width], qkv[:, :tokens, width:], heads, dim**-0.5


def test_it_is_the_first_rows_of_attention():
    qkv = torch.randn(3, 20, 3 * 32, dtype=torch.float64)
    want = attention(qkv, 4, impl="reference")[:, :5]
    torch.testing.assert_close(cross_attention(qkv[:, :5, :32], qkv[..., 32:], 4), want)


# One key is no sum; 17 and 197 leave a rest of a vector and of a chain of 64, 128 none.
@NATIVE
@pytest.mark.parametrize("family", ["random", "outlier", "one_hot"])
@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 17), (3, 128), (2, 197), (9, 5)])
def test_error_rule(isa, queries, tokens, family):
    for dtype in DTYPES:
        draws = 24 if dtype == torch.float32 else 8
        arguments = [call(queries, tokens, dtype, family, seed=seed) for seed in range(draws)]
        oracle.check_draws(OPS["cross_attention"], reference.cross_attention, arguments)


@NATIVE
@pytest.mark.parametrize("dim", [1, 20, 33, 64, 80])
def test_any_head_dimension(isa, dim):
    for dtype in DTYPES:
        arguments = [call(2, 50, dtype, dim=dim, seed=seed) for seed in range(8)]
        oracle.check_draws(OPS["cross_attention"], reference.cross_attention, arguments)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(base_isa, dtype):
    """Tokens before images, one query for all images, a channel axis that is strided."""
    q, kv, heads, scale = call(3, 33, dtype)
    spread = torch.empty(*kv.shape[:2], 2 * kv.shape[2], dtype=dtype)[..., ::2].copy_(kv)
    tokens_first = kv.transpose(0, 1).contiguous().transpose(0, 1)
    want = OPS["cross_attention"](q.contiguous(), kv.contiguous(), heads, scale)
    for keys in (tokens_first, spread):
        assert torch.equal(OPS["cross_attention"](q, keys, heads, scale), want)
    one = q[:1].expand(q.shape)
    want = OPS["cross_attention"](one.contiguous(), kv, heads, scale)
    assert torch.equal(OPS["cross_attention"](one, kv, heads, scale), want)


@NATIVE
def test_same_bits_for_any_number_of_threads():
    q, kv, heads, scale = call(5, 197, batch=8, heads=3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(OPS["cross_attention"](q, kv, heads, scale))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@NATIVE
def test_a_score_that_is_no_number(base_isa):
    """A NaN stays in its query's row."""
    q, kv, heads, scale = (t.clone() if isinstance(t, torch.Tensor) else t for t in call(3, 40))
    q[0, 1, 0] = float("nan")
    want = reference.cross_attention(q, kv, heads, scale)
    found = OPS["cross_attention"](q, kv, heads, scale)
    assert torch.equal(found.isnan(), want.isnan())
    assert found.isnan().any()


def test_gradients_are_the_references():
    q, kv, heads, scale = call(2, 30)
    leaves = [t.detach().clone().requires_grad_() for t in (q, kv)]
    assert explain("cross_attention", *leaves, heads).chosen == "reference"
    found = torch.autograd.grad(cross_attention(*leaves, heads).square().sum(), leaves)
    want = torch.autograd.grad(
        reference.cross_attention(*leaves, heads, scale).square().sum(), leaves
    )
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(NotImplementedError, match="forward-only"):
        cross_attention(*leaves, heads, impl="cpu")


Q, KV = torch.zeros(2, 3, 8), torch.zeros(2, 5, 16)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ((Q[0], KV, 2), {}, ValueError, r"q: expected rank 3; got shape \(3, 8\)"),
        ((Q, KV[0], 2), {}, ValueError, r"kv: expected rank 3; got shape \(5, 16\)"),
        ((Q, KV[..., :8], 2), {}, ValueError, r"kv: expected shape \(2, 5, 16\); got \(2, 5, 8\)"),
        ((Q, KV[:1], 2), {}, ValueError, r"kv: expected shape \(2, 5, 16\); got \(1, 5, 16\)"),
        ((Q, KV[:, :0], 2), {}, ValueError, "kv: expected at least one token"),
        ((Q, KV.double(), 2), {}, TypeError, "kv: expected torch.float32, as the input's"),
        ((Q, KV, 3), {}, ValueError, "q: expected a last axis that is a multiple of num_heads=3"),
        ((Q, KV, True), {}, ValueError, "num_heads: expected a positive integer; got True"),
        ((Q, KV, 2), {"scale": "x"}, TypeError, "scale: expected a number; got str"),
        ((Q, None, 2), {}, TypeError, "kv: expected a Tensor; got NoneType"),
    ],
)
def test_bad_input(given, options, error, message):
    with pytest.raises(error, match=message):
        cross_attention(*given, **options)
