"""Linear layers of few rows on Triton, in the interpreter: sums in parts, added in their order."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as implementation
from deit.kernels.linear import triton_row_stats as statistics
from deit.kernels.linear import triton_split as split
from deit.kernels.prove import oracle, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONFIG = linear_tiles.LinearConfig(64, 64, 64, 8, True, num_warps=4, num_stages=4, splits=3)


def _arguments(rows=(3, 17), width=72, depth=264, dtype=torch.float16, *, full=False):
    """The columns end within a tile, the channels within a block, the parts with one of a block."""
    make = functools.partial(oracle.make, "random")
    x = make((*rows, depth), dtype)
    weight = make((width, depth), dtype, seed=11, scale=depth**-0.5)
    bias = make((width,), dtype, seed=12)
    if not full:
        return x, weight, bias, None, None, None, None
    residual, gamma = make((*rows, width), torch.float32, seed=3), make((width,), seed=4)
    keep = torch.tensor([0.0, 1.25, 2.0])[: rows[0]]
    return x, weight, bias, "gelu", residual, gamma, keep


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_holds(dtype, full, tma):
    arguments = _arguments(dtype=dtype, full=full)
    config = replace(CONFIG, tma=tma and dtype != torch.float32)
    assert len(implementation.plan(*arguments, config=config)[1]) == 2
    out = implementation.linear(*arguments, config=config)
    oracle.check(out, reference.linear, arguments)


@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("splits", [2, 12])
def test_families(family, splits):
    _, weight, bias, *rest = _arguments(depth=768)
    arguments = (oracle.make(family, (5, 768), torch.float16), weight, bias, *rest)
    out = implementation.linear(*arguments, config=replace(CONFIG, splits=splits))
    oracle.check(out, reference.linear, arguments)


def test_views_that_no_descriptor_takes():
    x, weight, *rest = _arguments(depth=265)
    arguments = (x[:, 1:, 1:], weight[:, 1:], *rest)
    oracle.check(implementation.linear(*arguments, config=CONFIG), reference.linear, arguments)


@pytest.mark.parametrize(
    ("splits", "depth", "parts"),
    [(3, 264, (3, 128)), (12, 264, (5, 64)), (4, 320, (3, 128)), (2, 64, (1, 64)), (8, 8, (1, 64)),
     (6, 3072, (6, 512)), (3, 0, (1, 64))],
)  # fmt: skip
def test_no_part_is_empty(splits, depth, parts):
    """The fewest parts of that length: 320 channels are 5 blocks, in fours 3 parts of 2."""
    assert split.parts_of(replace(CONFIG, splits=splits), depth) == parts


def test_parts_are_added_in_their_order():
    """To the bit, and the same ones again: 1e8 + 1 - 1e8 is 0 in fp32 from the left alone."""
    x, weight = torch.zeros(1, 192), torch.ones(16, 192)
    x[0, 0], x[0, 64], x[0, 128] = 1e8, 1.0, -1e8
    config = replace(CONFIG, tma=False)
    out, launches = implementation.plan(x, weight, *[None] * 5, config=config)
    for launch in launches:
        launch.run(x)
    first, second, third = launches[0].arguments["parts"]
    assert [part[0, 0].item() for part in (first, second, third)] == [1e8, 1.0, -1e8]
    torch.testing.assert_close(out, (first + second) + third, rtol=0, atol=0)
    assert out.unique().tolist() == [0.0]
    again = implementation.linear(x, weight, *[None] * 5, config=config)
    torch.testing.assert_close(again, out, rtol=0, atol=0)


def test_in_training_and_with_row_statistics():
    x, weight, bias, activation, residual, gamma, keep = _arguments(width=128, full=True)
    arguments = (x, weight, bias, activation, residual, gamma, keep)
    out, affine = implementation.linear_fwd(*arguments, config=CONFIG)
    oracle.check(out, reference.linear, arguments)
    oracle.check(affine, reference.linear, (x, weight, bias, None, None, None, None))
    stats = statistics.empty(residual)
    planned, launches = implementation.plan(*arguments, row_stats=stats, config=CONFIG)
    for launch in launches:
        launch.run(x)
    torch.testing.assert_close(planned, out, rtol=0, atol=0)
    torch.testing.assert_close(stats, statistics.row_stats(out))


def test_nan_stays_in_its_row():
    x, *rest = _arguments(rows=(3, 5))
    x[1, 2, 200] = torch.nan
    out = implementation.linear(x, *rest, config=CONFIG)
    assert out.isnan().any(-1).nonzero().tolist() == [[1, 2]]
