"""Attention in plain PyTorch, for the references of every operator that has one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None) -> Tensor:
    """softmax(q kT * scale + key_bias) v (arXiv 1706.03762, eq. 1) on the packed projection.

    A sample whose keys are all -inf gives zeros.
    """
    batch, tokens, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    if qkv.stride(2) != 1 or qkv.stride(1) < channels:
        # PyTorch's attention on a CPU reads channels that are not side by side (before 2.15), and
        # tokens that overlap, from the wrong places.
        qkv = qkv.contiguous()
    mask = None if key_bias is None else _mask(key_bias, qkv)
    dtype = qkv.dtype
    if mask is not None and mask.dtype != dtype and qkv.device.type != "cpu":
        qkv = qkv.to(mask.dtype)  # CUDA's fused attention takes a mask of the queries' dtype alone
    q, k, v = qkv.view(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).to(dtype)
    return out.transpose(1, 2).reshape(batch, tokens, channels // 3)


def rotary_attention(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    sin: Tensor,
    cos: Tensor,
    prefix: int,
    interleaved: bool,
) -> Tensor:
    """`attention` of queries and keys with rotary positions (arXiv 2104.09864).

    A rotation is computed in the wider dtype of the two and rounded to qkv's.
    """
    batch, tokens, channels = qkv.shape
    q_and_k, v = qkv.split((channels // 3 * 2, channels // 3), dim=-1)
    head_dim = channels // (3 * num_heads)
    whole = q_and_k.reshape(batch, tokens, 2, num_heads, head_dim)
    whole = whole.transpose(1, 3)  # [B, H, 2, N, d]
    if sin.dim() == 3:
        sin, cos = sin[:, None], cos[:, None]  # [H, 1, N - prefix, d]
    x = whole[:, :, :, prefix:]
    rotated = (x * cos + turned(x, interleaved) * sin).to(qkv.dtype)
    whole = torch.cat([whole[:, :, :, :prefix], rotated], dim=3)
    packed = torch.cat([whole.transpose(1, 3).reshape(q_and_k.shape), v], dim=-1)
    return attention(packed, num_heads, scale, None)


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """x [..., d] with every pair (a, b) of channels as (-b, a): of neighbours where `interleaved`,
    else of channels d / 2 apart."""
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-b, a], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def _mask(key_bias: Tensor, qkv: Tensor) -> Tensor:
    """key_bias [B, N] for every head and query, fp32 beside half precision, as kernels add it.

    In half precision fp32's smallest number would become -inf. A sample whose keys all have that
    bias counts them all alike, and it would give zeros instead.
    """
    dtype = torch.promote_types(key_bias.dtype, qkv.dtype)
    return key_bias.to(dtype).contiguous()[:, None, None, :]
