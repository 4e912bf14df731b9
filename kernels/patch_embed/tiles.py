"""Tile sizes of the patch embedding and of its backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.device.tiles import Arguments, Choice, Choices, Configuration, accumulators
from deit.kernels.device.tuning import tunable


@dataclass(frozen=True)
class PatchEmbedConfig(Configuration):
    """Output tiles of block_m tokens x block_n channels, block_k pixels of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def rules(self, arguments: Arguments) -> list[str]:
        # Beside its pointers: 128 accumulators a thread spill 368 bytes on sm_90.
        return accumulators(self.block_m, self.block_n, self.num_warps, most=64)

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[PatchEmbedConfig]:
        tiles = ((128, 128), (64, 128), (128, 64))
        for (m, n), k, stages, warps in itertools.product(tiles, (32, 64), (3, 4), (8, 4)):
            yield cls(m, n, k, num_warps=warps, num_stages=stages)


@dataclass(frozen=True)
class PatchEmbedBwdConfig(Configuration):
    """Tiles of block_m channels x block_n pixels of dweight, block_k patches at a time.

    programs: for how many a multiprocessor the sum over patches is split.
    """

    block_m: int
    block_n: int
    block_k: int
    programs: int
    num_warps: int
    num_stages: int

    def rules(self, arguments: Arguments) -> list[str]:
        return accumulators(self.block_m, self.block_n, self.num_warps)

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


@tunable(PatchEmbedConfig)
def patch_embed(arch: int, dtype: torch.dtype, dim: int) -> PatchEmbedConfig:
    """Pointers, since a patch is no rectangle of the batch that a descriptor could describe."""
    if dtype == torch.float32:  # 64 tokens in 4 warps spill 8 bytes on sm_120
        return PatchEmbedConfig(128, 64, 16, num_warps=8, num_stages=3)
    block_n = 128 if dim % 128 == 0 else 64
    block_k = 64 if arch in (80, 90, 100) else 32
    return PatchEmbedConfig(128, block_n, block_k, num_warps=8, num_stages=3)


@tunable(PatchEmbedBwdConfig)
def patch_embed_bwd(arch: int, dtype: torch.dtype, dim: int) -> PatchEmbedBwdConfig:
    """Two programs of 8 warps a multiprocessor: 64 registers a thread of accumulator each."""
    if dtype == torch.float32:
        return PatchEmbedBwdConfig(64, 64, 16, programs=2, num_warps=4, num_stages=3)
    block_m = 128 if dim % 128 == 0 else 64
    block_k = 64 if arch in (80, 90, 100) else 32
    return PatchEmbedBwdConfig(block_m, 128, block_k, programs=2, num_warps=8, num_stages=3)


def _choose(images: Tensor, weight: Tensor, *_: Any) -> Choice:
    return [patch_embed.explain(common.architecture(images), images.dtype, weight.shape[0])]


CHOICES: Choices = {"patch_embed": _choose}
