"""Tile sizes of the MLP in one kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.device.few_rows import (
    BYTES,
    INSTRUCTIONS,
    LAUNCH,
    MANY,
    MULTIPROCESSORS,
    WORTH,
    operations,
    rows_class,
)
from deit.kernels.device.tiles import Arguments, Choice, Choices, Configuration, accumulators
from deit.kernels.device.tuning import tunable
from deit.kernels.linear import tiles as linear_tiles


@dataclass(frozen=True)
class MlpConfig(Configuration):
    """The single-kernel MLP: block_m rows stay on chip while the hidden layer passes by.

    chunk: D = 3 * chunk (every DeiT width is three times a power of two, tiles are powers of
        two). block_h: hidden channels at a time.
    """

    block_m: int
    block_h: int
    chunk: int
    tma: bool
    num_warps: int
    num_stages: int

    def rules(self, arguments: Arguments) -> list[str]:
        found = accumulators(self.block_m, 3 * self.chunk, self.num_warps)
        if 3 * self.chunk != arguments["dim"]:
            found.append(f"chunk {self.chunk}: D is {arguments['dim']}, expected 3 * chunk")
        if not self.tma:
            found.append("the one-kernel form needs tma")
        return found

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        x = 3 * self.block_m * self.chunk
        weights = self.num_stages * 2 * 3 * self.chunk * self.block_h
        return (x + weights + self.block_m * self.chunk) * itemsize  # which is written last

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[MlpConfig | None]:
        yield None  # two products
        chunk = arguments["dim"] // 3
        for block_m, block_h, warps in itertools.product((128, 64), (64, 32, 128), (8, 4)):
            yield cls(block_m, block_h, chunk, tma=True, num_warps=warps, num_stages=3)


@tunable(MlpConfig)
def gelu_mlp(
    arch: int,
    dtype: torch.dtype,
    dim: int,
    rows: int = MANY,
    multiprocessors: int = MULTIPROCESSORS,
) -> MlpConfig | None:
    """None where two products with the hidden layer in memory are expected to be faster.

    At D = 192 one kernel reads 0.6 MB of weights from L2 for every 128 rows, 0.23 GB at batch
    256, and saves writing and reading 155 MB of hidden layer. At D = 384 the accumulators
    (384 fp32 columns) leave room for 64 rows: 2.4 MB of weights for each 64 rows are 1.9 GB of
    L2 traffic, against 310 MB saved, so there the hidden layer goes through memory.

    One image is two programs of 132, of which each reads all weights. So where rows are few
    (their class: `few_rows.rows_class`), two products run if they are faster by count.
    """
    if dtype == torch.float32 or dim != 192 or arch not in (90, 100):
        return None
    one = MlpConfig(128, 64, 64, tma=True, num_warps=8, num_stages=3)
    if rows < MANY and _two_products(arch, dtype, dim, rows, multiprocessors) < WORTH * _one(
        one, arch, dtype, dim, rows, multiprocessors
    ):
        return None
    return one


def _one(
    config: MlpConfig, arch: int, dtype: torch.dtype, dim: int, rows: int, multiprocessors: int
) -> float:
    """Clocks, counted, at D' = 4 D: weights or multiply-adds, then 15 instructions of GELU."""
    weights = 8 * dim * dim * dtype.itemsize / BYTES
    products = 16 * config.block_m * dim * dim / operations(arch, dtype)
    gelu = 15 * config.block_m * 4 * dim / INSTRUCTIONS
    programs = math.ceil(rows / config.block_m)
    return math.ceil(programs / multiprocessors) * (max(weights, products) + gelu)


def _two_products(
    arch: int, dtype: torch.dtype, dim: int, rows: int, multiprocessors: int
) -> float:
    at = (arch, dtype)
    sizes = ((4 * dim, dim, rows, multiprocessors), (dim, 4 * dim, rows, multiprocessors))
    tiles = (linear_tiles.linear.pinned(*at, *size) for size in sizes)
    products = (
        linear_tiles.predicted(tile, *at, *size) for tile, size in zip(tiles, sizes, strict=True)
    )
    return sum(products) + LAUNCH


def asked(x: Tensor, dtype: torch.dtype | None = None) -> tuple[int, torch.dtype, int, int, int]:
    """What `gelu_mlp` chooses by, for x [..., D] and weights of `dtype`, x's if left out."""
    rows = rows_class(math.prod(x.shape[:-1]))
    arch, multiprocessors = common.architecture(x), common.multiprocessors(x)
    return arch, dtype or x.dtype, x.shape[-1], rows, multiprocessors


def choose(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *_: Any) -> Choice:
    """The one kernel, or the two products in its place."""
    one, evidence = gelu_mlp.explain(*asked(x))
    if one is not None:
        return [(one, evidence)]
    products = (*linear_tiles.choose(x, w1), *linear_tiles.choose(x, w2))
    return [("two products", evidence), *products]


CHOICES: Choices = {"gelu_mlp": choose}
