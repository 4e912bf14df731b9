"""attention on Triton against the fp64 oracle, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deit.kernels import attention, explain
from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.attention import triton as implementation
from deit.kernels.attention import triton_lean, triton_persistent
from deit.kernels.device import chips, common
from deit.kernels.engine import registry
from deit.kernels.prove import oracle, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_qkv(batch, tokens, heads=3, head_dim=64, dtype=torch.float16, family="random"):
    return oracle.packed(family, batch, tokens, heads, head_dim, dtype)


def _check(qkv, heads=3, key_bias=None, scale=0.125, config=None):
    if config is None:
        out = registry.COMPILED["triton"]["attention"](qkv, heads, scale, key_bias)
    else:
        out = implementation.attention(qkv, heads, scale, key_bias, config=config)
    oracle.check(out, reference.attention, (qkv, heads, scale, key_bias))
    return out


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(n, torch.float16) for n in (1, 17, 64, 197, 198, 256, 257, 577, 578, 1025)]
    + [(n, torch.float32) for n in (1, 17, 64, 197, 198, 257, 578)],
)
def test_tokens(tokens, dtype):
    heads = 3 if tokens < 197 else 1
    _check(make_qkv(2 if tokens < 197 else 1, tokens, heads, dtype=dtype), heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [*oracle.FAMILIES, "one_hot"])
def test_error_rule(family, dtype):
    _check(make_qkv(2, 50, dtype=dtype, family=family))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch):
    """Three samples and three heads are also enough for a program to take a whole head."""
    assert _check(make_qkv(batch, 70)).shape == (batch, 70, 192)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_head_dims(head_dim, dtype):
    _check(make_qkv(1, 40, heads=2, head_dim=head_dim, dtype=dtype), 2, scale=head_dim**-0.5)


@pytest.mark.parametrize("tokens", [50, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_key_bias(tokens, dtype):
    """Log sizes, padding at the end, and padding that hides the whole first block of keys."""
    bias = oracle.make("random", (3, tokens), dtype, seed=7)
    bias[1, tokens - 9 :] = -torch.inf
    bias[2, : tokens - 20] = -torch.inf
    _check(make_qkv(3, tokens, heads=1), 1, bias)
    _check(make_qkv(3, tokens, heads=1), 1, bias.t().contiguous().t())


@pytest.mark.parametrize("tokens", [50, 300])
def test_no_key_left_gives_zeros_as_pytorch(tokens):
    bias = torch.zeros(2, tokens, dtype=torch.float16)
    bias[1] = -torch.inf
    out = _check(make_qkv(2, tokens, heads=1), 1, bias)
    assert (out[1] == 0).all()


@pytest.mark.parametrize("tokens", [50, 300])
def test_nan_spreads_as_far_as_in_pytorch(tokens):
    qkv = make_qkv(2, tokens, heads=1)
    qkv[0, 3, 0] = torch.nan  # a query: its row
    qkv[1, 3, 64] = torch.nan  # a key: every row of the sample
    out = _check(qkv, 1)
    assert out[0, 3].isnan().all()
    assert out[0, 4:].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [50, 300])
def test_keys_at_the_smallest_number(tokens, dtype):
    """Times log2(e) it would be -inf, and what is 1/N of each value would be 0."""
    bias = torch.zeros(3, tokens)
    bias[1], bias[2, tokens // 2 :] = (torch.finfo(torch.float32).min,) * 2
    assert _check(make_qkv(3, tokens, heads=1, dtype=dtype), 1, bias)[1].abs().max() > 0


def test_nan_of_the_next_sample_stays_there():
    """Keys are padded to a block: what is read there must not be the next sample's."""
    qkv = make_qkv(2, 50, heads=1)
    qkv[1] = torch.nan
    assert _check(qkv, 1)[0].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5])
def test_scales(scale):
    _check(make_qkv(1, 17), scale=scale)


LEAN = [
    attention_tiles.AttentionConfig(64, keys, True, tma, 4, 2, lean=True, pointed=pointed)
    for keys, tma, pointed in ((32, True, False), (64, True, True), (64, False, False))
]


@pytest.mark.parametrize("config", LEAN, ids=["tma", "pointed", "pointers"])
def test_lean(config):
    """One block that is not full, full ones alone, and both."""
    for tokens in (5, 64, 100):
        qkv = make_qkv(1, tokens, dtype=torch.bfloat16)
        _, launch = implementation.plan(qkv, 3, 0.125, None, config=config)
        assert launch.kernel is triton_lean.lean_kernel
        _check(qkv, config=config)


@pytest.mark.parametrize("family", [*oracle.FAMILIES[1:], "one_hot"])
def test_lean_on_every_family(family):
    _check(make_qkv(2, 50, family=family), config=LEAN[0])


@pytest.mark.parametrize("tokens", [1, 16, 100, 197, 256])
def test_persistent(tokens):
    """One part of the keys and up to three, one block of queries and two, several a program."""
    qkv, config = make_qkv(2, tokens, heads=2), attention_tiles.persistent(tokens)
    _, launch = implementation.plan(qkv, 2, 0.125, None, config=config)
    assert launch.kernel is triton_persistent.persistent_kernel
    assert launch.grid[0] <= common.multiprocessors(qkv)
    _check(qkv, 2, config=config)


@pytest.mark.parametrize(("tokens", "heads", "units"), [(50, 2, 6), (197, 1, 6)])
def test_persistent_gives_the_same_bits_by_any_number_of_programs(tokens, heads, units):
    """A program a block, as one that is not persistent has, then fewer, one, and more than blocks;
    and of an image the same bits alone."""
    qkv = make_qkv(3, tokens, heads)

    def bits(qkv, programs=None):
        (out, _), launch = implementation.plan(
            qkv, heads, 0.125, None, config=attention_tiles.persistent(tokens)
        )
        assert launch.arguments["units"] == units * len(qkv) // 3
        out.fill_(torch.nan)
        replace(launch, grid=launch.grid if programs is None else (programs,)).run(qkv)
        return out

    expected = bits(qkv, units)
    assert expected.isfinite().all()
    for programs in (None, None, 1, 4, units + 3):
        assert torch.equal(bits(qkv, programs), expected), programs
    assert torch.equal(bits(qkv[1:2]), expected[1:2])


@pytest.mark.parametrize("family", [*oracle.FAMILIES[1:], "one_hot"])
def test_persistent_on_every_family(family):
    _check(
        make_qkv(2, 50, dtype=torch.bfloat16, family=family), config=attention_tiles.persistent(50)
    )


def test_persistent_reads_and_writes_its_own_sample_alone():
    """The copies of a sample's last rows end past it."""
    qkv = make_qkv(3, 50, heads=1)
    qkv[1] = torch.nan
    out = implementation.attention(qkv, 1, 0.125, None, config=attention_tiles.persistent(50))
    assert out[1].isnan().all()
    oracle.check(out[::2], reference.attention, (qkv[::2], 1, 0.125, None))


@pytest.mark.parametrize(
    "config", [LEAN[0], attention_tiles.persistent(70)], ids=["lean", "persistent"]
)
def test_what_is_not_lean_runs_by_the_same_tiles(config):
    """A key bias, what training saves, and a scale whose maximum is the scores' minimum."""
    qkv, bias = make_qkv(2, 70), torch.randn(2, 70)
    kernel = implementation._online_kernel if config.online else implementation._one_block_kernel
    for scale, key_bias, save_lse in ((0.125, bias, False), (-0.5, None, False), (0.0, None, False),
                                      (0.125, None, True)):  # fmt: skip
        options = {"save_lse": save_lse, "config": config}
        _, launch = implementation.plan(qkv, 3, scale, key_bias, **options)
        assert launch.kernel is kernel
        if not save_lse:
            _check(qkv, key_bias=key_bias, scale=scale, config=config)


@pytest.mark.parametrize("arch", chips.SHARED_MEMORY)
@pytest.mark.parametrize("tokens", [50, 300])
@pytest.mark.parametrize("tma", [True, False])
def test_every_architectures_configuration(arch, tokens, tma):
    config = attention_tiles.attention(arch, torch.float16, 64, tokens, tma)
    bias = oracle.make("random", (1, tokens), seed=7)
    _check(make_qkv(1, tokens, heads=1), 1, bias, config=config)


STRIDES = {
    "tokens after the first": lambda x: x[:, 1:],
    "batch and tokens swapped": lambda x: x.transpose(0, 1),
    "rows of odd length": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "odd first element": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "last axis strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    _check(STRIDES[name](make_qkv(3, 20)))


def test_offsets_past_32_bits():
    storage = torch.empty(2**31 + 17 * 192, dtype=torch.float16)
    qkv = storage.as_strided((2, 17, 192), (2**31, 192, 1))
    qkv.copy_(make_qkv(2, 17, heads=1))
    _check(qkv, 1)
    _check(qkv, 1, config=attention_tiles.attention(80, torch.float16, 64, 17))


def test_through_the_public_function():
    qkv, bias = make_qkv(2, 17), oracle.make("random", (2, 17), torch.float16, seed=7)
    assert explain("attention", qkv, 3, key_bias=bias).reasons["triton"] == []
    out = attention(qkv, 3, key_bias=bias, impl="triton")
    oracle.check(out, reference.attention, (qkv, 3, 64**-0.5, bias))
