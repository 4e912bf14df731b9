"""Tile sizes of the LayerNorms and RMSNorm, and which of them a call is launched with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.device.tiles import Arguments, Choice, Choices, Configuration
from deit.kernels.device.tuning import tunable


@dataclass(frozen=True)
class LayerNormConfig(Configuration):
    """rows: rows of the matrix a program normalises; a power of two."""

    rows: int
    num_warps: int

    def rules(self, arguments: Arguments) -> list[str]:
        each = (self.rows << max(arguments["dim"] - 1, 0).bit_length()) // (32 * self.num_warps)
        if each <= 128:
            return []
        return [f"{each} elements a thread, 128 fit its registers: 256 spill 488 bytes on sm_90"]

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[LayerNormConfig]:
        for rows, warps in itertools.product((1, 2, 4, 8, 16), (4, 8, 2)):
            yield cls(rows, warps)


@dataclass(frozen=True)
class LayerNormBwdConfig(Configuration):
    """rows: rows at a time, a power of two; programs: how many a multiprocessor has."""

    rows: int
    programs: int
    num_warps: int
    num_stages: int

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[LayerNormBwdConfig]:
        for rows, programs, warps in itertools.product((1, 2, 4, 8), (2, 1, 4), (4, 8)):
            yield replace(pinned, rows=rows, programs=programs, num_warps=warps)


Rows = TypeVar("Rows", LayerNormConfig, LayerNormBwdConfig)


@tunable(LayerNormConfig)
def layer_norm(arch: int, dtype: torch.dtype, dim: int) -> LayerNormConfig:
    """About 32 elements a thread: enough loads in flight to cover memory latency."""
    padded = 1 << max(dim - 1, 0).bit_length()
    num_warps = 4 if padded <= 4096 else 16
    # On sm_120 under triton 3.8, 32 elements spill 8 bytes in narrow rows of fp32.
    elements = 16 if arch == 120 and dtype == torch.float32 and padded <= 256 else 32
    rows = max(1, min(16, num_warps * 32 * elements // padded))
    return LayerNormConfig(rows=rows, num_warps=num_warps)


@tunable(LayerNormBwdConfig)
def layer_norm_bwd(arch: int, dtype: torch.dtype, dim: int) -> LayerNormBwdConfig:
    """16 elements a thread: without gamma, operands and sums of them fit 128 registers.

    Then two programs of 8 warps are resident, each with its next 4096 elements of every input on
    their way (cp.async): 32 KB a multiprocessor for two bf16 inputs, where 3.3 TB/s at 700 ns of
    latency need 18. With gamma it is 171 registers, one program, and 24 KB or more.
    """
    padded = 1 << max(dim - 1, 0).bit_length()
    num_warps = 8 if padded <= 8192 else 32
    # On sm_90 under triton 3.6, 16 spill 8 bytes in narrow rows of fp32, and 8 do in wide ones.
    elements = 8 if dtype == torch.float32 and padded <= 512 else 16
    rows = max(1, min(16, num_warps * 32 * elements // padded))
    return LayerNormBwdConfig(rows=rows, programs=2, num_warps=num_warps, num_stages=2)


def halved(config: Rows) -> Rows:
    """For a form of a kernel that spills 8 bytes by as many rows, on sm_90 under triton 3.6."""
    return replace(config, rows=max(1, config.rows // 2))


def rms_norm_bwd(arch: int, dtype: torch.dtype, dim: int) -> LayerNormBwdConfig:
    config = layer_norm_bwd(arch, dtype, dim)
    return config if dtype == torch.float32 or not 256 < dim <= 512 else halved(config)


def choose(x: Tensor, *_: Any) -> Choice:
    """What normalises the rows of x."""
    return [layer_norm.explain(common.architecture(x), x.dtype, x.shape[-1])]


CHOICES: Choices = {
    "layer_norm": choose,
    "add_layer_norm": choose,
    "rms_norm": choose,
}
