"""Tile sizes of the products in e4m3, beside those of `configs`. No GPU has timed any of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deit.kernels.engine.tuning import tunable
from deit.kernels.fp8.quantize import E4M3


@dataclass(frozen=True)
class Fp8Config:
    """Output tiles of block_m x block_n, 128 of the sum at a time (fp8_quantize.GROUP).

    block_n: 128; or 256, by halves that share x's tile, with tma.
    group: tiles are numbered down `group` rows of tiles before the next column, for L2 reuse.
    tma: read x and weight, and write what can be, by tensor descriptors.
    """

    block_m: int
    block_n: int
    group: int
    tma: bool
    num_warps: int
    num_stages: int


@tunable(Fp8Config)
def fp8_product(arch: int, dtype: torch.dtype, width: int, depth: int) -> Fp8Config:
    """`width` output channels, `depth` summed ones, whole groups of them; dtype: the result's.

    By 128 x 128 an H100 at fp8's nominal 1979 TFLOP/s would read 64 bytes a clock and
    multiprocessor from L2, by 128 x 256 48, where 39 are to be had: an A100's 5120 bytes a clock
    (its whitepaper; H100's says nothing) for 132. There the sums, and the product that is added to
    them, take 192 registers a thread: fc1, which writes e4m3, takes 229 in all on sm_90; the other
    products spill up to 96 bytes, and on sm_100 all do. By mma.sync, whose operands are
    in registers too, 128 x 128 spills 8 to 16 on sm_120.
    """
    if arch == 90 and dtype == E4M3 and width % 256 == 0:
        return Fp8Config(128, 256, group=8, tma=True, num_warps=8, num_stages=3)
    if arch in (90, 100):
        return Fp8Config(128, 128, group=8, tma=True, num_warps=8, num_stages=4)
    return Fp8Config(64, 128, group=8, tma=False, num_warps=8, num_stages=3)
