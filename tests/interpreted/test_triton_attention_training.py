"""attention_fwd and attention_bwd on Triton against fp64 autograd, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from test_triton_attention import DTYPES, STRIDES, make_qkv

from deit.kernels import attention
from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.attention import triton_bwd as backward
from deit.kernels.device import chips
from deit.kernels.engine import registry
from deit.kernels.prove import oracle, reference

FWD, BWD = (registry.COMPILED["triton"][name] for name in ("attention_fwd", "attention_bwd"))


def gradients(dout, qkv, heads, scale, key_bias):
    """dq, dk and dv by autograd of the reference."""
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        reference.attention(leaf, heads, scale, key_bias).backward(dout)
    return leaf.grad.chunk(3, dim=-1)


def _dout(qkv, family="random"):
    shape = (*qkv.shape[:2], qkv.shape[2] // 3)
    return oracle.make(family, shape, qkv.dtype, seed=11, mean=8.0)


def _check(qkv, heads=3, key_bias=None, scale=0.125, config=None, dout=None):
    """Hold dqkv to the error rule, q, k and v each; returns it."""
    dout = _dout(qkv) if dout is None else dout
    out, lse = FWD(qkv, heads, scale, key_bias)
    if config is None:
        dqkv = BWD(dout, qkv, out, lse, heads, scale, key_bias)
    else:
        dqkv = backward.attention_bwd(dout, qkv, out, lse, heads, scale, key_bias, config=config)
    assert dqkv.shape == qkv.shape
    assert dqkv.is_contiguous()
    oracle.check(dqkv.chunk(3, dim=-1), gradients, (dout, qkv, heads, scale, key_bias))
    return dqkv


def _exact_scores(qkv, step):
    """q and k as multiples of `step`, so that q kT is exact in fp32 in any order of summation.

    The backward's p is as good as its scores agree with the forward's. Triton's products sum
    q kT and its transpose in one order; the interpreter's BLAS does not, and at scores of 100
    that is all of the fp32 error.
    """
    qkv = qkv.clone()
    width = qkv.shape[-1] // 3 * 2
    qkv[..., :width] = (qkv[..., :width] / step).round() * step
    return qkv


def _split(arch=80, tokens=50, dtype=torch.float16):
    return attention_tiles.attention_bwd(arch, dtype, 64, tokens, tma=False)


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(n, torch.float16) for n in (17, 64, 197, 198, 256, 257, 577, 578)]
    + [(n, torch.float32) for n in (17, 64, 197)],
)
def test_tokens(tokens, dtype):
    heads = 2 if tokens < 300 else 1
    _check(make_qkv(2 if tokens < 197 else 1, tokens, heads, dtype=dtype), heads)


def test_many_tokens():
    _check(make_qkv(1, 1025, heads=1), 1)


CASES = [(family, dtype) for family in (*oracle.FAMILIES, "one_hot") for dtype in DTYPES]
CASES = [case for case in CASES if case[0] != "large_mean"]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_error_rule(family, dtype):
    qkv = make_qkv(2, 70, dtype=dtype, family=family)
    if family == "one_hot":
        qkv = _exact_scores(qkv, 1 / 8)
    dout = _dout(qkv, "outlier" if family == "outlier" else "random")
    _check(qkv, dout=dout)
    if dtype == torch.float16:
        _check(qkv, dout=dout, config=_split())


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(dtype):
    """Around a mean of 1000 in v, dp and delta are 8000, their difference of order 1: fp32 leaves
    noise, PyTorch's as ours. Of one draw of 8 heads the ratio of the two was 0.67 to 1.72 in the
    norm and up to 1.87 in the maximum; pooled over ten it is 0.91 to 1.08 and 0.85 to 1.11."""

    def ours(dout, qkv, *others):
        out, lse = FWD(qkv, *others)
        return BWD(dout, qkv, out, lse, *others).chunk(3, dim=-1)

    draws = []
    for seed in range(0, 400, 50):
        qkv = oracle.packed("large_mean", 8, 32, 1, dtype=dtype, seed=seed + 1)
        dout = oracle.make("random", (8, 32, 64), dtype, seed=seed + 11)
        draws.append((dout, _exact_scores(qkv, 1 / 64), 1, 0.125, None))
    oracle.check_draws(ours, gradients, draws)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch):
    _check(make_qkv(batch, 20))


def test_logits_beyond_fp16():
    """q kT overflows fp16, by itself and after the scale; scores are fp32 throughout.

    Keys score alike in pairs, which differ where queries are 0. Else a softmax of such scores is
    one key and q's and k's gradients nothing but rounding, whose size depends on the processor.
    """
    qkv = _exact_scores(make_qkv(1, 50, heads=1, family="one_hot"), 1 / 8)
    qkv[..., :32] = 0
    qkv[:, 25:, 96:128] = qkv[:, :25, 96:128]
    qkv[..., :128] *= 64
    q, k, _ = qkv.double().chunk(3, dim=-1)
    assert (0.125 * q @ k.mT).abs().max() > torch.finfo(torch.float16).max
    out, _ = FWD(qkv, 1, 0.125, None)
    oracle.check(out, reference.attention, (qkv, 1, 0.125, None))
    assert _check(qkv, 1)[..., :32].abs().mean() > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 80, 96, 128])
def test_head_dims(head_dim, dtype):
    qkv = make_qkv(1, 70, heads=2, head_dim=head_dim, dtype=dtype)
    _check(qkv, 2, scale=head_dim**-0.5)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(50, torch.float16), (150, torch.float16), (50, torch.float32)]
)
def test_key_bias(tokens, dtype):
    """Log sizes; padding at the end; all but the last keys hidden; every key hidden."""
    bias = oracle.make("random", (4, tokens), dtype, seed=7)
    bias[1, tokens - 9 :] = -torch.inf
    bias[2, : tokens - 20] = -torch.inf
    qkv = make_qkv(4, tokens, heads=1, dtype=dtype)
    _check(qkv[:3], 1, bias[:3])
    _check(qkv[:3], 1, bias[:3].t().contiguous().t(), config=_split(dtype=dtype))
    bias[3] = -torch.inf
    for config in (None, _split(dtype=dtype)):
        out, lse = FWD(qkv, 1, 0.125, bias)
        dqkv = backward.attention_bwd(_dout(qkv), qkv, out, lse, 1, 0.125, bias, config=config)
        assert (out[3] == 0).all()
        assert (lse[3] == -torch.inf).all()
        assert (dqkv[3] == 0).all()
        assert dqkv.isfinite().all()


def test_bias_of_keys_does_not_reach_padded_queries():
    """Queries are padded with zeros: exp(0 + 1000) there would be infinite, and inf * 0 NaN."""
    qkv, bias = make_qkv(1, 50, heads=1), torch.full((1, 50), 1000.0)
    _check(qkv, 1, bias)
    _check(qkv, 1, bias, config=_split())


@pytest.mark.parametrize("tokens", [40, 260])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse(tokens, dtype):
    qkv, bias = make_qkv(2, tokens, dtype=dtype), oracle.make("random", (2, tokens), seed=7)
    out, lse = FWD(qkv, 3, 0.125, bias)
    oracle.check(out, reference.attention, (qkv, 3, 0.125, bias))
    q, k, _ = qkv.double().view(2, tokens, 3, 3, 64).permute(2, 0, 3, 1, 4)
    expected = (0.125 * q @ k.mT + bias.double()[:, None, None]).logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_token(dtype):
    """lse is the score to the bit, so p is exactly 1, however large the score: dv is dout. dq and
    dk are exactly 0; what is left of dp - delta is fp32 rounding (PyTorch's is no better)."""
    qkv = make_qkv(2, 1, heads=1, dtype=dtype, family="one_hot")
    dout = _dout(qkv)
    out, lse = FWD(qkv, 1, 0.125, None)
    assert lse.abs().min() > 1
    for config in (None, _split(dtype=dtype)):
        dqkv = backward.attention_bwd(dout, qkv, out, lse, 1, 0.125, None, config=config)
        dq, dk, dv = dqkv.chunk(3, dim=-1)
        assert torch.equal(dv, dout)
        q, k, v = (t.abs().max() for t in qkv.double().chunk(3, dim=-1))
        spare = 64 * torch.finfo(torch.float32).eps * 0.125 * dout.abs().max() * v
        assert dq.abs().max() <= spare * k
        assert dk.abs().max() <= spare * q


@pytest.mark.parametrize("arch", chips.SHARED_MEMORY)
@pytest.mark.parametrize("tokens", [50, 300])
@pytest.mark.parametrize("tma", [True, False])
def test_every_architectures_configuration(arch, tokens, tma):
    config = attention_tiles.attention_bwd(arch, torch.float16, 64, tokens, tma)
    bias = oracle.make("random", (1, tokens), seed=7)
    _check(make_qkv(1, tokens, heads=1), 1, bias, config=config)


@pytest.mark.parametrize("name", STRIDES)
def test_strides_of_qkv(name):
    _check(STRIDES[name](make_qkv(3, 20)))


DOUT_STRIDES = STRIDES | {
    "of a sum": lambda x: x[:1, :1, :1].expand(x.shape),
    "of a mean over tokens": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("name", DOUT_STRIDES)
def test_strides_of_dout(name):
    dout = DOUT_STRIDES[name](oracle.make("random", (20, 20, 192), torch.float16, seed=11))
    qkv = make_qkv(*dout.shape[:2])
    _check(qkv[:2], dout=dout[:2])
    _check(qkv[:2], dout=dout[:2], config=_split())


@pytest.mark.parametrize("config", [None, _split()], ids=["whole head", "split"])
def test_offsets_past_32_bits(config):
    def far(x):
        size = x.shape[1] * x.shape[2]
        storage = torch.empty(2**31 + size, dtype=x.dtype)
        return storage.as_strided(x.shape, (2**31, x.shape[2], 1)).copy_(x)

    qkv = make_qkv(2, 17, heads=1)
    _check(far(qkv), 1, dout=far(_dout(qkv)), config=config)


@pytest.mark.parametrize("tokens", [197, 257])
def test_runs_repeat_to_the_bit(tokens):
    qkv = make_qkv(1, tokens, heads=2)
    out, lse = FWD(qkv, 2, 0.125, None)
    first, *others = (BWD(_dout(qkv), qkv, out, lse, 2, 0.125, None) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_nan_stays_in_its_sample_and_head():
    qkv = make_qkv(2, 50, heads=2)
    qkv[1, 3, :64] = torch.nan  # a query of the first head
    for config in (None, _split()):
        out, lse = FWD(qkv, 2, 0.125, None)
        dqkv = backward.attention_bwd(_dout(qkv), qkv, out, lse, 2, 0.125, None, config=config)
        dqkv = dqkv.view(2, 50, 3, 2, 64)
        assert dqkv[0].isfinite().all()
        assert dqkv[1, :, :, 1].isfinite().all()
        assert dqkv[1, :, 1:, 0].isnan().all()
        assert dqkv[1, 4:, 0, 0].isfinite().all()


@pytest.mark.parametrize("empty", [(0, 5), (2, 0)])
def test_empty(empty):
    qkv = torch.empty(*empty, 192, dtype=torch.float16, requires_grad=True)
    attention(qkv, 1, impl="triton").sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_gradient_through_the_public_function():
    qkv, bias = make_qkv(2, 30), oracle.make("random", (2, 30), torch.float16, seed=7)
    dout = _dout(qkv)
    leaf = qkv.clone().requires_grad_()
    out = attention(leaf, 3, key_bias=bias, impl="triton")
    oracle.check(out, reference.attention, (qkv, 3, 0.125, bias))
    out.backward(dout)
    oracle.check(leaf.grad.chunk(3, dim=-1), gradients, (dout, qkv, 3, 0.125, bias))
    with pytest.raises(NotImplementedError, match="key_bias requires grad"):
        attention(leaf, 3, key_bias=bias.requires_grad_(), impl="triton")


def test_opcheck():
    qkv, bias = make_qkv(2, 20), oracle.make("random", (2, 20), seed=7)
    out, lse = FWD(qkv, 3, 0.125, bias)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(FWD, (qkv, 3, 0.125, bias), test_utils=checks)
    torch.library.opcheck(BWD, (_dout(qkv), qkv, out, lse, 3, 0.125, bias), test_utils=checks)
