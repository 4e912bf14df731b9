"""Cross-attention in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_attention(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> Tensor:
    """softmax(q kT * scale) v (arXiv 1706.03762, eq. 1), keys and values side by side."""
    if kv.stride(2) != 1 or kv.stride(1) < kv.shape[2]:
        kv = kv.contiguous()  # PyTorch's attention misreads such tensors, as in `attention`
    if q.stride(2) != 1 or q.stride(1) < q.shape[2]:
        q = q.contiguous()
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, R, d]
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
