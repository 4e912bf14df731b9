"""Products whose loops Triton flattens, by any number of programs: the bits of the plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import simulator
import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.fp8 import tiles as fp8_tiles
from deit.kernels.fp8 import triton as fp8
from deit.kernels.fp8 import triton_product as fp8_product
from deit.kernels.fp8 import triton_rows as fp8_rows
from deit.kernels.fp8.quantize import E4M3
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as linear
from deit.kernels.prove import oracle

# Rows of three images, and columns, that no tile fills; sums of several steps. A row is whole
# 16 bytes, without which nothing is flattened.
ROWS, DEPTH, WIDTH = (3, 50), 200, 304
_DTYPE = torch.bfloat16


def _layer() -> tuple[Tensor, Tensor]:
    weight = oracle.make("random", (WIDTH, DEPTH), _DTYPE, seed=1, scale=DEPTH**-0.5)
    return weight, oracle.make("random", (WIDTH,), _DTYPE, seed=2)


def _e4m3(x: Tensor, columns: int, flatten: bool) -> tuple[Tensor, common.Launch]:
    """fc1's hidden layer."""
    config = fp8_tiles.fp8_product(90, E4M3, WIDTH, 256)
    config = replace(config, block_m=64, block_n=columns, flatten=flatten)
    weight, bias = _layer()
    rows, quantising = fp8_rows.plan(x, None)
    quantising.run(x)
    hidden, launch = fp8_product.plan_hidden(rows, fp8.kept(weight), bias, config=config)
    return hidden.e4m3.view(torch.uint8), launch


def _linear(x: Tensor, columns: int, flatten: bool) -> tuple[Tensor, common.Launch]:
    config = linear_tiles.linear(90, _DTYPE, WIDTH, DEPTH)
    config = replace(config, block_m=64, block_n=columns, flatten=flatten)
    residual = oracle.make("random", (*ROWS, WIDTH), _DTYPE, seed=3)
    out, (launch,) = linear.plan(x, *_layer(), "gelu", residual, None, None, config=config)
    return out, launch


def _fused(ir: str) -> bool:
    """Whether a loop's turns ask if they begin or end a tile; the kernels have no other `if`."""
    return '"scf.if"' in ir


@pytest.mark.parametrize(
    ("plan", "columns"),
    [(_e4m3, 128), (_e4m3, 256), (_linear, 128)],
    ids=["e4m3, 128", "e4m3, 256", "linear"],
)
def test_flattened_loops_give_the_bits_of_the_plain_ones(
    plan: Callable[[Tensor, int, bool], tuple[Tensor, common.Launch]], columns: int
) -> None:
    """By one program, by fewer than tiles and no divisor of them, by as many and by more."""
    x = oracle.make("random", (*ROWS, DEPTH), _DTYPE)
    tiles = 3 * -(-WIDTH // columns)

    def bits(flatten: bool, programs: int) -> Tensor:
        out, launch = plan(x, columns, flatten)
        replace(launch, grid=(programs,)).run(x)
        return out

    with simulator.device(90) as launched:
        expected = bits(False, tiles)
        plain = [bits(False, programs) for programs in (1, 4)]
        assert not any(_fused(ir) for ir in simulator.executed())
        with simulator.flattened():
            flattened = [bits(True, programs) for programs in (tiles, tiles, 1, 4, tiles + 3)]
            assert any(_fused(ir) for ir in simulator.executed())
        assert not launched.races_unchecked
    for out in (*plain, *flattened):
        assert torch.equal(out, expected)
