"""Tile sizes of attention and of its backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.device.tiles import Arguments, Choice, Choices, Configuration, accumulators
from deit.kernels.device.tuning import tunable

# Up to this many keys are held at once: 197 and 198 tokens pad to 256.
ONE_BLOCK_KEYS = 256

# GPUs whose matrix units read all keys of triton_persistent.py from shared memory.
PERSISTENT = (90, 100)

# Widths of a head that a descriptor's block, whose sides are powers of two, covers exactly.
TMA_HEAD_DIMS = (32, 64, 128)


@dataclass(frozen=True)
class AttentionConfig(Configuration):
    """block_m queries meet block_n keys at a time.

    online: softmax rescales as blocks of keys pass; else block_n holds every key.
    tma: read qkv by tensor descriptors where its strides and address allow them.
    lean: in the calls that they take (`plan`), by triton_lean.py where softmax is online and else
        by triton_persistent.py; in all others by these tiles.
    pointed: by triton_lean.py, with tma, queries come by pointers.
    """

    block_m: int
    block_n: int
    online: bool
    tma: bool
    num_warps: int
    num_stages: int
    lean: bool = False
    pointed: bool = False

    def rules(self, arguments: Arguments) -> list[str]:
        found = []
        if self.lean and arguments["dtype"] == torch.float32:
            found.append("lean: of half precision")
        if self.lean and self.online and not self.tma and self.block_n > 64:
            found.append("lean: 64 keys at most by pointers, 128 spill 32 bytes on sm_120")
        served = arguments["arch"] in PERSISTENT and arguments["head_dim"] == 64
        if self.lean and not self.online and not served:
            found.append("lean, all keys at once: of 64 channels, on sm_90 and sm_100")
        if self.pointed and not (self.lean and self.online and self.tma):
            found.append("pointed: of lean and online, with tma")
        if not self.online:
            if self.block_n < arguments["tokens"]:
                found.append(f"block_n {self.block_n} for {arguments['tokens']} keys at once")
            if not self.tma:
                found.append("all keys at once need tma")
        return found + accumulators(self.block_m, self.block_n, self.num_warps)

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        keys = 2 * self.block_n * (self.num_stages if self.online else 1)
        rows = keys + self.block_m
        if self.lean and not self.online:
            stage = 2 * padded_keys(arguments["tokens"]) + self.block_m
            rows = self.num_stages * stage + self.block_m
        return rows * arguments["head_dim"] * itemsize

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[AttentionConfig]:
        everything = max(16, 1 << (arguments["tokens"] - 1).bit_length())
        if arguments["tokens"] <= ONE_BLOCK_KEYS:
            for stages in (3, 2):
                yield persistent(arguments["tokens"], stages)
        for tiles, pointed in itertools.product(((64, 64, 2), (64, 128, 2), (64, 32, 3)), (1, 0)):
            # Other heads were not compiled. Of 128 keys, where blocks are few, Q is not awaited.
            if arguments["head_dim"] == 64 and (pointed or tiles[1] < 128):
                yield lean(pinned, *tiles, pointed=bool(pointed))
        for block_m, warps in itertools.product((64, 128), (4, 8)):
            if arguments["tokens"] <= ONE_BLOCK_KEYS:
                yield cls(block_m, everything, False, tma=True, num_warps=warps, num_stages=3)
            for block_n, stages in itertools.product((64, 128, 32), (3, 2)):
                yield cls(block_m, block_n, True, pinned.tma, num_warps=warps, num_stages=stages)


def lean(
    pinned: AttentionConfig, block_m: int, block_n: int, num_stages: int, *, pointed: bool
) -> AttentionConfig:
    """`AttentionConfig.lean` in 4 warps, reading as `pinned` does."""
    return AttentionConfig(
        block_m, block_n, True, pinned.tma, 4, num_stages, lean=True, pointed=pointed
    )


def persistent(tokens: int, num_stages: int = 3) -> AttentionConfig:
    """`AttentionConfig.lean` with all keys at once: 128 queries in 8 warps."""
    keys = max(16, 1 << (tokens - 1).bit_length())
    return AttentionConfig(128, keys, False, True, 8, num_stages, lean=True)


def padded_keys(tokens: int) -> int:
    """How many keys triton_persistent.py takes at once."""
    return -(-tokens // 16) * 16


@dataclass(frozen=True)
class AttentionBwdConfig(Configuration):
    """`resident` keys or queries stay on chip while the others pass, `passing` at a time.

    whole_head: all queries of a head are resident, and one program does the head; `resident` is
        at least the number of tokens.
    tma: read qkv and dout by tensor descriptors.
    """

    resident: int
    passing: int
    whole_head: bool
    tma: bool
    num_warps: int
    num_stages: int

    def rules(self, arguments: Arguments) -> list[str]:
        if self.whole_head and self.resident < arguments["tokens"]:
            return [f"resident {self.resident} for a head of {arguments['tokens']} tokens"]
        if self.whole_head and not self.tma:
            return ["a whole head at once needs tma"]
        # Scores, dp and two gradients: 192 of them, 128 x 32 in 4 warps, spill 8 bytes on sm_90.
        tiles = 2 * self.resident * (self.passing + arguments["head_dim"])
        each = tiles // (32 * self.num_warps)
        if not self.whole_head and each >= 192:
            return [f"{each} sums a thread, fewer than 192 fit its registers"]
        return []

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        rows = 2 * self.resident + 2 * self.num_stages * self.passing
        return rows * arguments["head_dim"] * itemsize

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[AttentionBwdConfig]:
        everything = max(64, 1 << (arguments["tokens"] - 1).bit_length())
        if arguments["arch"] == 90 and arguments["tokens"] <= ONE_BLOCK_KEYS:
            for passing in (32, 64):
                yield cls(everything, passing, True, tma=True, num_warps=8, num_stages=3)
        for resident, passing, warps in itertools.product((64, 128), (64, 32, 128), (4, 8)):
            yield replace(
                pinned, resident=resident, passing=passing, whole_head=False, num_warps=warps
            )


@dataclass(frozen=True)
class RotaryConfig(AttentionConfig):
    """The same with rotary positions, which are read by pointers."""

    def rules(self, arguments: Arguments) -> list[str]:
        if self.tma or not self.online or self.lean:
            return ["rotary positions need online softmax without tma, and are not lean"]
        return super().rules(arguments)

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[RotaryConfig]:
        for block_m, block_n, warps in itertools.product((64, 32), (32, 16, 64), (4, 8)):
            for stages in (2, 3):
                yield cls(block_m, block_n, True, tma=False, num_warps=warps, num_stages=stages)


@dataclass(frozen=True)
class RotaryBwdConfig(AttentionBwdConfig):
    """The same of the backward."""

    def rules(self, arguments: Arguments) -> list[str]:
        if self.tma or self.whole_head:
            return ["rotary positions need blocks of a head without tma"]
        return super().rules(arguments)

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[RotaryBwdConfig]:
        for resident, passing, warps in itertools.product((64, 32), (32, 16, 64), (4, 8)):
            yield replace(pinned, resident=resident, passing=passing, num_warps=warps)


@tunable(AttentionConfig)
def attention(
    arch: int, dtype: torch.dtype, head_dim: int, tokens: int, tma: bool = True
) -> AttentionConfig:
    """`tma`: whether the input's strides and address suit a descriptor.

    All keys of one head at once need a matrix unit that reads them from shared memory (wgmma,
    tcgen05). With mma.sync they sit in registers and 64 x 256 scores spill 100 to 450 bytes, as
    they do on Hopper without tensor copies.
    """
    if dtype == torch.float32:
        # IEEE products run on the plain cores, operands in registers. Larger tiles, 4 warps, 16 x
        # 32 for 80 channels and 16 x 16 for 128 (80 on sm_120) spill 8 to 64 bytes somewhere.
        block_m = 32 if head_dim <= 64 else 16
        block_n = 16 if head_dim in (80, 96) and arch != 120 else 32
        return AttentionConfig(block_m, block_n, True, tma=False, num_warps=8, num_stages=2)
    if arch not in (90, 100) or not tma or head_dim not in TMA_HEAD_DIMS:
        # 128 channels: fewer keys at a time, or the operands spill 8 to 56 bytes.
        block_m, block_n, warps = (64, 64, 4) if head_dim <= 64 else (128, 32, 8)
        if head_dim == 32:
            block_n = 32  # 64 keys spill 8 bytes on sm_80, with two stages or with three
        return AttentionConfig(block_m, block_n, True, tma=False, num_warps=warps, num_stages=3)
    if arch == 90 and head_dim == 64:
        # Measured on an H100 in bf16, in microseconds. 256 images of 197 tokens, with 12 / 6 / 3
        # heads, take 174 / 88 / 48 by 32 keys, and 176 / 95 / 52 with all keys at once, in 252
        # registers that may spill. 64 images of 577 tokens, with 12 heads, take 230 by 128 keys,
        # and 244 by 128 queries and 64 keys.
        block_n, stages = (32, 3) if tokens <= ONE_BLOCK_KEYS else (128, 2)
        return AttentionConfig(64, block_n, True, tma=True, num_warps=4, num_stages=stages)
    if tokens <= ONE_BLOCK_KEYS and head_dim == 64:
        # 64 x 256 fp32 scores are 128 registers a thread in 4 warps, and spill 200 bytes. Heads
        # of 32 and 128 channels, which no DeiT has, spill 8 to 48 bytes under triton 3.6.
        block_n = max(16, 1 << (tokens - 1).bit_length())
        return AttentionConfig(64, block_n, False, tma=True, num_warps=8, num_stages=3)
    if head_dim == 32 and arch == 100:
        # No DeiT has such heads. By 128 queries and 8 warps they spill 8 bytes here, by 64 keys
        # with a bias under triton 3.8.
        return AttentionConfig(64, 32, True, tma=True, num_warps=4, num_stages=3)
    stages = 3 if head_dim <= 64 else 2
    return AttentionConfig(128, 64, True, tma=True, num_warps=8, num_stages=stages)


@tunable(AttentionBwdConfig)
def attention_bwd(
    arch: int, dtype: torch.dtype, head_dim: int, tokens: int, tma: bool = True
) -> AttentionBwdConfig:
    """`tma`: whether qkv's strides and address suit a descriptor.

    A whole head of 256 x 64 fits on Hopper. q and dout take 64 KB of shared memory. Keys and
    values, 32 at a time, and p and ds between the products bring it to 123 KB. In 8 warps dq takes
    64 registers a thread, and 32 columns of scores and of dp take 32 each: at most 243 in all. 32
    keys also waste least: 197 tokens are 7 blocks of 32 (224) and 4 of 64 (256). Blackwell spills
    16 to 112 bytes there.
    """
    tma = tma and arch in (90, 100) and head_dim in TMA_HEAD_DIMS
    if dtype == torch.float32:
        # 128 channels: 32 at a time spill 450 bytes on Hopper. Two stages of 64: 8 on Blackwell.
        passing, stages = (32, 3) if head_dim <= 64 else (16, 2)
        return AttentionBwdConfig(32, passing, False, tma=False, num_warps=8, num_stages=stages)
    if arch == 90 and tma and tokens <= ONE_BLOCK_KEYS and head_dim == 64:
        resident = max(64, 1 << (tokens - 1).bit_length())
        # Two stages spill 8 bytes under triton 3.6 with a key bias; the third takes 8 KB.
        return AttentionBwdConfig(resident, 32, True, tma=True, num_warps=8, num_stages=3)
    if head_dim <= 64:
        # By pointers 64 x 64 spills 8 to 56 bytes on one architecture or another.
        passing = 64 if tma else 32
        # Heads of 32 channels, which no DeiT has, spill 8 bytes in 4 warps of mma.sync on sm_120.
        warps = 8 if head_dim == 32 and not tma else 4
        return AttentionBwdConfig(64, passing, False, tma=tma, num_warps=warps, num_stages=2)
    # 64 x 64 spills 72 bytes; 4 warps of mma.sync spill 16.
    return AttentionBwdConfig(64, 32, False, tma=tma, num_warps=4 if tma else 8, num_stages=2)


@tunable(RotaryConfig)
def rotary_attention(arch: int, dtype: torch.dtype, head_dim: int) -> RotaryConfig:
    """Tables and the other channels of pairs take as much room as keys do, so fewer keys pass at a
    time. None of it has run on a GPU."""
    if dtype == torch.float32:
        return RotaryConfig(32, 16, True, tma=False, num_warps=8, num_stages=2)
    stages = 3 if head_dim == 32 else 2  # of 32 channels two spill 8 bytes on sm_100
    return RotaryConfig(64, 32, True, tma=False, num_warps=4, num_stages=stages)


@tunable(RotaryBwdConfig)
def rotary_attention_bwd(arch: int, dtype: torch.dtype, head_dim: int) -> RotaryBwdConfig:
    """Larger tiles spill 8 to 100 bytes."""
    if dtype == torch.float32:
        resident = 32 if head_dim == 32 else 16
        return RotaryBwdConfig(resident, 16, False, tma=False, num_warps=8, num_stages=2)
    wide = arch in (90, 100) or head_dim == 32
    resident, warps = (64, 8) if wide else (32, 4)
    return RotaryBwdConfig(resident, 32, False, tma=False, num_warps=warps, num_stages=2)


def choose(qkv: Tensor, num_heads: int, *_: Any) -> Choice:
    """What attends within qkv."""
    tokens, head_dim = qkv.shape[1], qkv.shape[-1] // (3 * num_heads)
    tma = common.describable(common.last_contiguous(qkv))
    return [attention.explain(common.architecture(qkv), qkv.dtype, head_dim, tokens, tma)]


def choose_rotary(qkv: Tensor, num_heads: int, *_: Any) -> Choice:
    """The same with rotary positions."""
    head_dim = qkv.shape[-1] // (3 * num_heads)
    return [rotary_attention.explain(common.architecture(qkv), qkv.dtype, head_dim)]


CHOICES: Choices = {"attention": choose, "rotary_attention": choose_rotary}
