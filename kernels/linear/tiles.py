"""Tile sizes of the products: of a linear layer, behind a LayerNorm, and of gradients."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.device.chips import CHIPS, REGISTERS
from deit.kernels.device.few_rows import MANY, MULTIPROCESSORS, WORTH, clocks, rows_class
from deit.kernels.device.tiles import Arguments, Choice, Choices, Configuration, accumulators
from deit.kernels.device.tuning import tunable

# Into how many parts a sum may be cut. None is a multiple of 16, which Triton compiles for anew.
SPLITS = (1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class LinearConfig(Configuration):
    """Output tiles of block_m x block_n, block_k of the sum at a time.

    group: tiles are numbered down `group` rows of tiles before the next column, for L2 reuse.
    tma: read x and weight and write the output by tensor descriptors where strides and
        addresses allow them.
    flatten: the loops over tiles and over the sum are one pipeline, so that the next tile's
        operands are on their way during this one's epilogue.
    programs: how many a multiprocessor has. Of two, one multiplies during the other's epilogue.
    splits: parts that each sum is cut into, of which a program has one (triton_split.py).
    early: a residual is loaded before the sum, so that it is there when the sum is.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    tma: bool
    num_warps: int
    num_stages: int
    flatten: bool = False
    programs: int = 1
    splits: int = 1
    early: bool = False

    def epilogues(self, columns: int = 128) -> int:
        """Blocks of that many columns in which the epilogue runs.

        A 128 x 256 tile at once spills 100 to 350 bytes.
        """
        return max(1, self.block_n // columns)

    def without_tma(self) -> LinearConfig:
        """For inputs no descriptor can take.

        Pointers to a 128 x 256 tile would spill. Pointers to any tile spill where the loops are
        flattened or the warps are 4.
        """
        if not self.tma:
            return self
        block_n = min(self.block_n, 128)
        return replace(
            self, tma=False, block_n=block_n, num_warps=8, flatten=False, programs=1, early=False
        )

    def rules(self, arguments: Arguments) -> list[str]:
        found = accumulators(self.block_m, self.block_n, self.num_warps)
        width, depth = arguments["width"], arguments["depth"]
        if self.block_n > 2 * width or self.block_k > 2 * depth:
            found.append(f"a tile of {self.block_n} x {self.block_k} for {width} x {depth}")
        if not self.tma and self.block_n > 128:
            found.append("block_n above 128 without tma, which runs as 128")
        if self.programs > 1:
            found += self._room(arguments)
        if (self.splits > 1 or self.early) and "rows" not in arguments:
            found.append("splits and early: a gradient has no residual, and cuts sums by count")
        if self.splits > 1:
            found += self._parts(arguments)
        return found

    def _room(self, arguments: Arguments) -> list[str]:
        """Why a multiprocessor has no room for `programs` of them; empty where it may."""
        found = []
        arch, itemsize = arguments["arch"], arguments["dtype"].itemsize
        each, limit = self.shared_memory(arguments, itemsize), CHIPS[arch].shared
        if self.programs * each > limit:
            found.append(f"{self.programs} programs of {each} bytes, sm_{arch} has {limit}")
        # Beside its accumulators a thread has about as many registers again.
        sums = self.programs * self.block_m * self.block_n
        if sums > REGISTERS // 2:
            found.append(f"{sums} accumulators, {REGISTERS // 2} fit a multiprocessor")
        return found

    def _parts(self, arguments: Arguments) -> list[str]:
        found, steps = [], -(-arguments["depth"] // self.block_k)
        if self.splits > steps:
            found.append(f"splits is {self.splits}, expected {steps} at most")
        if self.flatten or self.programs > 1 or self.early:
            found.append("splits: a program has one part, no next tile and no residual")
        return found

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        stage = (self.block_m + self.block_n) * self.block_k * itemsize
        # An epilogue of 128 columns is written through shared memory.
        written = self.block_m * min(self.block_n, 128) * itemsize
        return self.num_stages * stage + (written if self.tma else 0)

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[LinearConfig]:
        """Tiles about the pinned one first: where time is short, these are what is tried."""
        if arguments.get("rows", MANY) < MANY:
            yield from for_few_rows(**arguments)
            return
        tiles: tuple[tuple[int, int], ...]
        if arguments["dtype"] == torch.float32:
            tiles, ks = ((64, 64), (128, 64), (64, 128)), (16, 32)
        else:
            if pinned.tma:  # pointers spill
                yield from _overlapped(pinned)
            tiles, ks = (
                ((128, 256), (128, 128), (256, 128), (64, 256), (128, 64), (64, 128)),
                (64, 32),
            )
        for (m, n), block_k, stages, warps in itertools.product(tiles, ks, (3, 4), (8, 4)):
            yield replace(
                pinned, block_m=m, block_n=n, block_k=block_k, num_stages=stages, num_warps=warps,
                programs=1,
            )  # fmt: skip


def _overlapped(pinned: LinearConfig) -> Iterator[LinearConfig]:
    """What hides an epilogue, of those that spill nothing on sm_90.

    Two programs a multiprocessor, of which one multiplies meanwhile: 128 x 128 by two stages, or
    shared memory has no room for two. And residuals on their way during the sum: 128 x 256 takes
    234 registers, and flattened 255 and 416 bytes of stack.
    """
    for (block_n, stages), flatten in itertools.product(((128, 2), (64, 3)), (False, True)):
        tile = replace(pinned, block_m=128, block_n=block_n, num_warps=4, num_stages=stages)
        yield replace(tile, flatten=flatten, programs=2)
    yield replace(pinned, flatten=False, early=True)
    if pinned.block_n == 256:
        yield replace(pinned, block_n=128, num_stages=4, early=True)


@dataclass(frozen=True)
class PanelConfig(Configuration):
    """A product whose block_m rows of x stay on chip, normalised once, while all of weight passes.

    chunk: D = 3 * chunk (as the single-kernel MLP's). block_n: output columns at a time. The rows
        come by tensor descriptors.
    """

    block_m: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int

    def rules(self, arguments: Arguments) -> list[str]:
        found = accumulators(self.block_m, self.block_n, self.num_warps)
        if 3 * self.chunk != arguments["depth"]:
            found.append(f"chunk {self.chunk}: D is {arguments['depth']}, expected 3 * chunk")
        if arguments["arch"] not in (90, 100) or arguments["dtype"] == torch.float32:
            found.append("a panel needs tensor copies, and half precision")
        return found

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        weights = self.num_stages * 3 * self.chunk * self.block_n
        x = 3 * self.block_m * self.chunk
        return (x + weights + self.block_m * self.block_n) * itemsize

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[PanelConfig | None]:
        yield None  # LayerNorm in a kernel of its own
        chunk = arguments["depth"] // 3
        for block_m, block_n, stages in itertools.product((128, 64), (128, 64), (2, 3)):
            yield cls(block_m, block_n, chunk, num_warps=8, num_stages=stages)


@dataclass(frozen=True)
class OutputGradientConfig(Configuration):
    """The elementwise pass of `linear`'s backward: `chunk` rows of `columns` columns a program,
    `rows` at a time, and one partial sum a column."""

    chunk: int
    rows: int
    columns: int
    num_warps: int


@tunable(LinearConfig)
def linear(
    arch: int,
    dtype: torch.dtype,
    width: int,
    depth: int,
    rows: int = MANY,
    multiprocessors: int = MULTIPROCESSORS,
) -> LinearConfig:
    """`width` output channels, `depth` summed ones; rows: their class (`few_rows.rows_class`).

    Where rows are few and the tiles for many would leave multiprocessors idle, the fastest of
    `for_few_rows`, if it is faster by a fifth: counted, not timed.
    """
    pinned = _for_many_rows(arch, dtype, width)
    if rows >= MANY or _tiles(pinned, rows, width) >= multiprocessors:
        return pinned
    best = for_few_rows(arch, dtype, width, depth, rows, multiprocessors)[0]
    taken, before = (
        predicted(config, arch, dtype, width, depth, rows, multiprocessors)
        for config in (best, pinned)
    )
    return best if taken < WORTH * before else pinned


def _for_many_rows(arch: int, dtype: torch.dtype, width: int) -> LinearConfig:
    if dtype == torch.float32:
        return LinearConfig(64, 64, 16, group=8, tma=False, num_warps=4, num_stages=3)
    # 192 = 3 * 64, 384 = 3 * 128 and 768 = 3 * 256 columns: the widest tile that wastes none.
    block_n = 256 if width % 256 == 0 else 128 if width % 128 == 0 else 64
    if arch == 90:
        # Measured on an H100 in bf16, 256 images of 197 tokens, in microseconds. Flattened, and
        # not: DeiT-B qkv 264, 295; fc1 421, 460; DeiT-S qkv 91, 118. By 64 columns two programs of
        # 4 warps, and one of 8 that is not flattened: DeiT-Ti qkv 37, 71; fc2 55, 68; proj 28, 40.
        if block_n == 64:
            return LinearConfig(128, 64, 64, 8, True, 4, 3, flatten=True, programs=2)
        stages = 3 if block_n == 256 else 4
        return LinearConfig(128, block_n, 64, 8, True, 8, stages, flatten=True)
    if arch == 100:
        stages = 3 if block_n == 256 else 4
        return LinearConfig(128, block_n, 64, group=8, tma=True, num_warps=8, num_stages=stages)
    block_n = min(block_n, 128)
    if arch == 80:
        return LinearConfig(128, block_n, 64, group=8, tma=False, num_warps=8, num_stages=3)
    return LinearConfig(128, block_n, 32, group=8, tma=False, num_warps=8, num_stages=4)


@functools.cache
def for_few_rows(
    arch: int, dtype: torch.dtype, width: int, depth: int, rows: int, multiprocessors: int
) -> tuple[LinearConfig, ...]:
    """Lower and narrower tiles, their sums whole or in parts; the fastest by count first.

    A tile of 64 x 64 reads twice the bytes of a 128 x 128 one for a multiply-add, and four of them
    stand for one.
    """
    pinned, asked = _for_many_rows(arch, dtype, width), (width, depth, rows, multiprocessors)
    tiles: tuple[tuple[int, int], ...] = ((64, 64), (64, 128), (128, 64), (128, 128))
    if dtype == torch.float32:
        tiles = ((64, 64),)
    stages = 4 if pinned.tma else pinned.num_stages
    if arch == 80 and dtype != torch.float32:
        stages -= 1  # with one more, parts of 128 x 64 spill 8 bytes under triton 3.6
    found = [
        replace(
            pinned, block_m=m, block_n=n, num_warps=8 if m * n == 128 * 128 else 4,
            num_stages=stages, flatten=False, programs=1, splits=splits, early=False,
        )
        for (m, n), splits in itertools.product(tiles, SPLITS)
        if splits * pinned.block_k <= max(depth, pinned.block_k)
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda config: predicted(config, arch, dtype, *asked)))


def predicted(
    config: LinearConfig,
    arch: int,
    dtype: torch.dtype,
    width: int,
    depth: int,
    rows: int,
    multiprocessors: int,
) -> float:
    """Clocks, counted (`few_rows.clocks`)."""
    tile = (config.block_m, config.block_n, config.block_k)
    return clocks(arch, dtype, (rows, width, depth), tile, config.splits, multiprocessors)


def _tiles(config: LinearConfig, rows: int, width: int) -> int:
    return -(-rows // config.block_m) * -(-width // config.block_n)


@tunable(PanelConfig)
def norm_panel(arch: int, dtype: torch.dtype, width: int, depth: int) -> PanelConfig | None:
    """None where LayerNorm in a kernel of its own is expected to be no slower.

    At D = 384 64 rows and 64 columns at a time are what fits without spills: products so narrow
    that reading their operands from shared memory takes twice as long as multiplying them.
    """
    if dtype == torch.float32 or arch not in (90, 100) or depth != 192:
        return None
    block_n = 128 if arch == 90 else 64  # 128 columns of GELU spill 64 bytes on sm_100
    return PanelConfig(128, block_n, depth // 3, num_warps=8, num_stages=2)


@tunable(OutputGradientConfig)
def output_gradient(width: int) -> OutputGradientConfig:
    """2048 elements a program at a time; 2364 programs for DeiT-B's 50432 x 768."""
    columns = 128 if width % 128 == 0 else 64
    return OutputGradientConfig(chunk=128, rows=2048 // columns, columns=columns, num_warps=4)


@tunable(LinearConfig)
def input_gradient(
    arch: int, dtype: torch.dtype, width: int, depth: int, *, gelu: bool
) -> LinearConfig:
    """`width` input channels, summed over `depth` output channels."""
    if dtype == torch.float32 and arch == 120:  # 4 warps spill 16 bytes under triton 3.8
        return LinearConfig(64, 64, 16, group=8, tma=False, num_warps=8, num_stages=3)
    if gelu and arch == 120 and width % 128:  # four stages spill 8 bytes through QuickGELU
        return LinearConfig(128, 64, 32, group=8, tma=False, num_warps=8, num_stages=3)
    return linear.pinned(arch, dtype, width, depth)


@tunable(LinearConfig)
def weight_gradient(arch: int, dtype: torch.dtype, width: int, depth: int) -> LinearConfig:
    """A `width` x `depth` matrix, summed over the rows of x."""
    if dtype == torch.float32:  # 64 x 64 in 4 warps spill 8 to 32 bytes; here too a thread sums 32
        return LinearConfig(128, 64, 16, group=8, tma=False, num_warps=8, num_stages=3)
    return linear.pinned(arch, dtype, depth, width)


def splits(tiles: int, steps: int, programs: int) -> int:
    """Into how many parts to cut a sum of `steps` blocks for each of `tiles` tiles.

    The fewest steps for the busiest of `programs`, plus what the parts cost to write and read:
    a 128 x 256 tile in fp32 and back is 0.26 MB, 0.09 us at 3 TB/s, an eighth of the 0.7 us that
    its step of 64 takes a multiprocessor of an H100.
    """

    def cost(count: int) -> float:
        return -(-tiles * count // programs) * -(-steps // count) + count * tiles / 8

    return min(range(1, min(steps, 64) + 1), key=cost)


def asked(x: Tensor, weight: Tensor) -> tuple[int, torch.dtype, int, int, int, int]:
    """What `linear` chooses by, for x @ weight.T."""
    rows = rows_class(math.prod(x.shape[:-1]))
    arch, multiprocessors = common.architecture(x), common.multiprocessors(x)
    return arch, weight.dtype, weight.shape[0], weight.shape[1], rows, multiprocessors


def choose(x: Tensor, weight: Tensor, *_: Any) -> Choice:
    """What multiplies x by weight."""
    return [linear.explain(*asked(x, weight))]


CHOICES: Choices = {"linear": choose}
