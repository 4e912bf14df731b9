"""A whole block in plain PyTorch, and the row statistics of its stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.attention.reference import attention
from deit.kernels.gelu_mlp.reference import gelu_mlp
from deit.kernels.layer_norm.reference import layer_norm
from deit.kernels.linear.reference import linear
from deit.kernels.linear.row_stats import STATS_COLUMNS
from deit.kernels.vit_block.arguments import BlockArguments


def row_stats(x: Tensor) -> Tensor:
    """[..., 2, parts] of x [..., D]: mean and sum of squares about it, of every 64 columns."""
    x = x.double() if x.dtype == torch.float64 else x.float()
    parts = x.split(STATS_COLUMNS, dim=-1)
    means = torch.stack([part.mean(-1) for part in parts], -1)
    squares = [(part - part.mean(-1, keepdim=True)).square().sum(-1) for part in parts]
    return torch.stack([means, torch.stack(squares, -1)], -2)


def vit_block(*arguments: Any) -> tuple[Tensor, Tensor]:
    """A pre-norm block (arXiv 2010.11929, eq. 2 and 3) and its output's row statistics.

    LN sees x itself: statistics that came with it are left unread.
    """
    b = BlockArguments(*arguments)
    dtype = b.qkv_weight.dtype
    normed = layer_norm(b.x, b.norm1_weight, b.norm1_bias, b.eps).to(dtype)
    qkv = F.linear(normed, b.qkv_weight, b.qkv_bias)
    mixed = attention(qkv, b.num_heads, b.scale, b.key_bias)
    x = linear(mixed, b.proj_weight, b.proj_bias, None, b.x, b.gamma1, None)
    normed = layer_norm(x, b.norm2_weight, b.norm2_bias, b.eps).to(dtype)
    y = gelu_mlp(normed, b.w1, b.b1, b.w2, b.b2, x, b.gamma2, None, b.activation)
    return y, row_stats(y)
