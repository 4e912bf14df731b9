"""The patch embedding in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor, pos_embed: Tensor
) -> Tensor:
    """concat(prefix, patches wT + bias) + pos_embed (arXiv 2010.11929, eq. 1)."""
    patches = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = torch.cat([prefix.expand(images.shape[0], -1, -1), patches], dim=1)
    return tokens + pos_embed
