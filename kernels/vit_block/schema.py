"""Schema and fake of a whole block: its output, and the row statistics of that."""

from __future__ import annotations

import torch
from torch import Tensor

from deit.kernels.engine.registry import CSRC, define
from deit.kernels.linear.row_stats import row_stats_shape
from deit.kernels.vit_block.arguments import block_schema


def fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """The fake of `vit_block`, however its weights lie."""
    return x.new_empty(x.shape), x.new_empty(row_stats_shape(x.shape), dtype=torch.float32)


define("vit_block", block_schema("(Tensor, Tensor)"), fake, cpu=CSRC, triton="vit_block.triton")
