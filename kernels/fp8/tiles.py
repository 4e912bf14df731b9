"""Tile sizes of the products in e4m3. No GPU has timed any of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.device.tiles import Arguments, Choice, Choices, Configuration
from deit.kernels.device.tuning import tunable
from deit.kernels.fp8.quantize import E4M3, GROUP
from deit.kernels.layer_norm import tiles as layer_norm_tiles

SUMS = 192  # a thread's fp32: 128 x 256 in 8 warps; fc1 compiles without spills


@dataclass(frozen=True)
class Fp8Config(Configuration):
    """Output tiles of block_m x block_n, 128 of the sum at a time (`quantize.GROUP`).

    block_n: 128; or 256, by halves that share x's tile, with tma.
    group: tiles are numbered down `group` rows of tiles before the next column, for L2 reuse.
    tma: read x and weight, and write what can be, by tensor descriptors.
    flatten: the loops over tiles and over the sum are one pipeline, so that the next tile's
        operands are on their way during this one's epilogue.
    """

    block_m: int
    block_n: int
    group: int
    tma: bool
    num_warps: int
    num_stages: int
    flatten: bool = False

    def rules(self, arguments: Arguments) -> list[str]:
        """The product of 128 columns that is added next stands beside the accumulators."""
        each = self.block_m * (self.block_n + GROUP) // (32 * self.num_warps)
        fit = SUMS if arguments["dtype"] == E4M3 else SUMS - 1  # others spill 8 to 128 bytes
        found = [] if each <= fit else [f"{each} sums a thread, {fit} fit its registers"]
        if self.block_n not in ((GROUP, 2 * GROUP) if self.tma else (GROUP,)):
            found.append(f"block_n {self.block_n}: {GROUP}, or {2 * GROUP} with tma, is there")
        if self.flatten and not self.tma:
            found.append("flatten: with tma alone")
        return found

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        written = self.block_m * min(self.block_n, GROUP) * itemsize if self.tma else 0
        return self.num_stages * (self.block_m + self.block_n) * GROUP + written

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[Fp8Config]:
        yield replace(pinned, flatten=True)  # 255 registers at most, no spills on sm_90
        tiles = ((128, 256), (128, 128), (64, 128), (64, 256))
        for (m, n), stages, warps in itertools.product(tiles, (3, 4, 2), (8, 4)):
            yield replace(pinned, block_m=m, block_n=n, num_stages=stages, num_warps=warps)


@tunable(Fp8Config)
def fp8_product(arch: int, dtype: torch.dtype, width: int, depth: int) -> Fp8Config:
    """`width` output channels, `depth` summed ones, whole groups of them; dtype: the result's.

    At fp8's nominal 1979 TFLOP/s an H100 would read 64 bytes a clock and multiprocessor from L2 by
    tiles of 128 x 128, and 48 by tiles of 128 x 256. L2 has 39: an A100's 5120 bytes a clock (its
    whitepaper; H100's says nothing) for 132. By 128 x 256 the sums, and the product that is added
    to them, take 192 registers a thread. fc1, which writes e4m3, takes 229 in all on sm_90; the
    other products spill up to 96 bytes there, and on sm_100 all do. By mma.sync, whose operands are
    in registers too, 128 x 128 spills 8 to 16 on sm_120.
    """
    if arch == 90 and dtype == E4M3 and width % 256 == 0:
        return Fp8Config(128, 256, group=8, tma=True, num_warps=8, num_stages=3)
    if arch in (90, 100):
        return Fp8Config(128, 128, group=8, tma=True, num_warps=8, num_stages=4)
    return Fp8Config(64, 128, group=8, tma=False, num_warps=8, num_stages=3)


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Choice:
    return [*layer_norm_tiles.choose(x), _product(x.dtype, weight)]


def _gelu_mlp(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *_: Any) -> Choice:
    return [*layer_norm_tiles.choose(x), _product(E4M3, w1), _product(x.dtype, w2)]


def _product(dtype: torch.dtype, weight: Tensor) -> tuple[Any, str]:
    width, depth = weight.shape
    padded = -(-depth // GROUP) * GROUP
    return fp8_product.explain(common.architecture(weight), dtype, width, padded)


CHOICES: Choices = {
    "fp8_linear": _linear,
    "fp8_gelu_mlp": _gelu_mlp,
}
