"""A whole block in plain PyTorch, and the row statistics of its stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.attention.reference import attention
from deit.kernels.engine.fakes import STATS_COLUMNS
from deit.kernels.gelu_mlp.reference import gelu_mlp
from deit.kernels.layer_norm.reference import layer_norm
from deit.kernels.linear.reference import linear


def row_stats(x: Tensor) -> Tensor:
    """[..., 2, parts] of x [..., D]: mean and sum of squares about it, of every 64 columns."""
    x = x.double() if x.dtype == torch.float64 else x.float()
    parts = x.split(STATS_COLUMNS, dim=-1)
    means = torch.stack([part.mean(-1) for part in parts], -1)
    squares = [(part - part.mean(-1, keepdim=True)).square().sum(-1) for part in parts]
    return torch.stack([means, torch.stack(squares, -1)], -2)


def vit_block(
    x: Tensor,
    row_stats_of_x: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma2: Tensor | None,
    key_bias: Tensor | None,
    num_heads: int,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A pre-norm block (arXiv 2010.11929, eq. 2 and 3) and its output's row statistics.

    LN sees x itself: statistics that came with it are left unread.
    """
    dtype = qkv_weight.dtype
    normed = layer_norm(x, norm1_weight, norm1_bias, eps).to(dtype)
    qkv = F.linear(normed, qkv_weight, qkv_bias)
    mixed = attention(qkv, num_heads, scale, key_bias)
    x = linear(mixed, proj_weight, proj_bias, None, x, gamma1, None)
    normed = layer_norm(x, norm2_weight, norm2_bias, eps).to(dtype)
    y = gelu_mlp(normed, w1, b1, w2, b2, x, gamma2, None)
    return y, row_stats(y)
