"""rotary_attention on Triton, forward and backward, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from test_triton_attention import DTYPES, STRIDES, make_qkv

from deit.kernels import explain, rotary_attention
from deit.kernels.attention import TRITON_ROTARY_HEAD_DIMS
from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.attention import triton as forward
from deit.kernels.attention import triton_bwd as backward
from deit.kernels.device import chips
from deit.kernels.engine import registry
from deit.kernels.prove import oracle, reference

OPS = registry.COMPILED["triton"]


def tables(tokens, heads=2, head_dim=64, prefix=1, dtype=torch.float16, per_head=False, seed=0):
    """Halves of one table, as models keep them; a pair's two channels have angles of their own."""
    shape = (heads, tokens - prefix, head_dim)[not per_head :]
    angles = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype).chunk(2, dim=-1)


def gradients(dout, qkv, *rest):
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        reference.rotary_attention(leaf, *rest).backward(dout)
    return leaf.grad.chunk(3, dim=-1)


def _check(qkv, sin, cos, heads=2, prefix=1, interleaved=False, config=None, bwd_config=None):
    """Hold the output and dqkv to the error rule."""
    rest = (heads, (qkv.shape[-1] // (3 * heads)) ** -0.5, sin, cos, prefix, interleaved)
    oracle.check(
        forward.rotary_attention(qkv, *rest, config=config),
        reference.rotary_attention,
        (qkv, *rest),
    )
    out, lse = forward.rotary_attention_fwd(qkv, *rest, config=config)
    dout = oracle.make("random", out.shape, qkv.dtype, seed=11)
    dqkv = backward.rotary_attention_bwd(dout, qkv, out, lse, *rest, config=bwd_config)
    oracle.check(dqkv.chunk(3, dim=-1), gradients, (dout, qkv, *rest))


@pytest.mark.parametrize(("tokens", "prefix"), [(9, 1), (17, 0), (70, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tokens_and_prefixes(tokens, prefix, interleaved):
    for dtype in DTYPES:
        sin, cos = tables(tokens, 1, 64, prefix, dtype)
        _check(make_qkv(1, tokens, 1, dtype=dtype), sin, cos, 1, prefix, interleaved)


def test_many_blocks():
    _check(make_qkv(1, 201, 1), *tables(201, 1, prefix=5), 1, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", TRITON_ROTARY_HEAD_DIMS)
def test_head_dims_and_tables_by_head(head_dim, interleaved, dtype):
    sin, cos = tables(20, 2, head_dim, 2, dtype, per_head=True)
    _check(make_qkv(2, 20, 2, head_dim, dtype), sin, cos, 2, 2, interleaved)


@pytest.mark.parametrize("arch", chips.SHARED_MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_architectures_configuration(arch, dtype):
    known = (arch, dtype, 64)
    _check(
        make_qkv(1, 40, 1, dtype=dtype),
        *tables(40, 1, dtype=dtype),
        1,
        interleaved=True,
        config=attention_tiles.rotary_attention(*known),
        bwd_config=attention_tiles.rotary_attention_bwd(*known),
    )


def test_fp32_tables_beside_half_precision():
    _check(make_qkv(2, 30, 2), *tables(30, dtype=torch.float32))


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    qkv = STRIDES[name](make_qkv(3, 9))
    _check(qkv, *tables(qkv.shape[1], 3), 3)


def test_strides_of_tables():
    sin, cos = tables(20, per_head=True)
    _check(make_qkv(1, 20, 2), sin.transpose(0, 1).contiguous().transpose(0, 1), cos)
    _check(make_qkv(1, 20, 2), sin.mT.contiguous().mT, cos)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_prefix_is_left_alone(interleaved):
    """Not turned by an angle of 0: infinity times a sine of 0 would be NaN."""
    qkv, (sin, cos) = make_qkv(1, 9, 2), tables(9, prefix=4)
    qkv[:, 0, 1] = torch.inf
    qkv[:, 0, 128:256] = 0
    found = OPS["rotary_attention"](qkv, 2, 0.125, sin, cos, 4, interleaved)
    assert found[:, 1:].isfinite().all()


def test_through_the_public_function():
    qkv, (sin, cos) = make_qkv(2, 17, 2), tables(17)
    assert explain("rotary_attention", qkv, 2, sin, cos, prefix=1).reasons["triton"] == []
    out = rotary_attention(qkv, 2, sin, cos, prefix=1, impl="triton")
    oracle.check(out, reference.rotary_attention, (qkv, 2, 64**-0.5, sin, cos, 1, False))


def test_wider_heads_are_refused():
    qkv, (sin, cos) = make_qkv(1, 9, 2, 80), tables(9, head_dim=80)
    reasons = explain("rotary_attention", qkv, 2, sin, cos, prefix=1).reasons["triton"]
    assert any("head dimension 80" in reason for reason in reasons)
