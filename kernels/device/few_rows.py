"""How long a product takes, counted: what chooses tiles where few rows leave a GPU half empty.

A tile is as long as the larger of two: its operands' way from L2, and its multiply-adds. The device
is as long as its busiest multiprocessor. No figure here was timed; where rows are many, tiles are
chosen by what was (an operator's tiles.py).
"""

from __future__ import annotations

import math

import torch

# Beyond 2,048 rows (ten images) all are one class, whose tiles are those that an H100 timed at
# 50,432. DeiT-B's widest fill its multiprocessors from 6,000 rows on.
MANY = 4096
_LEAST = 64  # no tile is lower

MULTIPROCESSORS = 132  # of an H100
# Bytes of L2 that a multiprocessor reads in a clock: an A100's documented 5120 for 132 of them.
BYTES = 39
# fp32 operations a clock and multiprocessor: of the matrix units in half precision (whitepapers; of
# 89 and 120, GeForce's), and of the plain cores.
_HALF = {80: 2048, 89: 512, 90: 4096, 100: 8192, 120: 512}
_SINGLE = {80: 128, 89: 256, 90: 256, 100: 256, 120: 256}

INSTRUCTIONS = 128  # of the plain cores in a clock

# Clocks from the end of one launch to the first numbers of the next: 1.7 us of an H100.
LAUNCH = 3000
WORTH = 0.8  # of the tiles for many rows, what others may take to be chosen


def rows_class(rows: int) -> int:
    """The power of two that stands for `rows` in a configuration's key: 64 to MANY."""
    return min(max(1 << (rows - 1).bit_length(), _LEAST), MANY)


def operations(arch: int, dtype: torch.dtype) -> int:
    """Of a multiprocessor in a clock; a multiply-add is two."""
    return (_SINGLE if dtype == torch.float32 else _HALF)[arch]


def clocks(
    arch: int,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    tile: tuple[int, int, int],
    splits: int,
    multiprocessors: int,
) -> float:
    """Of the busiest multiprocessor, for rows x width summed over depth (`size`).

    tile: block_m, block_n, block_k. splits: parts of the sum, each a program's, written in fp32 and
        read by a second launch where they are several.
    """
    (rows, width, depth), (block_m, block_n, block_k) = size, tile
    tiles = math.ceil(rows / block_m) * math.ceil(width / block_n)
    step = max(
        (block_m + block_n) * block_k * dtype.itemsize / BYTES,
        2 * block_m * block_n * block_k / operations(arch, dtype),
    )
    steps = math.ceil(math.ceil(depth / block_k) / splits)
    total = math.ceil(tiles * splits / multiprocessors) * steps * step
    if splits > 1:
        parts = 2 * splits * rows * width * torch.float32.itemsize
        total += LAUNCH + parts / (multiprocessors * BYTES)
    return total
