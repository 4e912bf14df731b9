"""`deit.kernels.attention` behind transformers' AttentionInterface, masks included.

transformers hands over q, k and v as [B, H, N, d] views and wants [B, N, H, d] back. The kernel
reads one packed [B, N, 3 * H * d] tensor, so they are copied together first; `fuse` on a DeiT or
ViT projects into the packed form and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from deit.kernels import attention


def register(name: str, impl: str) -> None:
    """Register attention and mask functions as `name`; see `deit.fused_vit.register_hf`."""
    import transformers
    from transformers import masking_utils
    from transformers.integrations import sdpa_attention

    if int(transformers.__version__.split(".")[0]) < 5:
        # Before 5, ViT passed its multiplicative head_mask where an additive mask is expected.
        raise ImportError(
            f"transformers: expected version 5 or later; got {transformers.__version__}"
        )
    fallback = sdpa_attention.sdpa_attention_forward
    transformers.AttentionInterface.register(name, _Forward(impl, fallback))
    # Without a mask function of the same name transformers drops every mask.
    transformers.AttentionMaskInterface.register(name, _Mask(masking_utils))


class _Forward:
    """The attention function for one choice of implementation.

    `fallback` is transformers' own function, which serves what ours does not. It is handed in
    because torch 2.11's Dynamo traces no import within a call.
    """

    def __init__(self, impl: str, fallback: Callable[..., Any]) -> None:
        self.impl, self.fallback = impl, fallback

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """q, k, v [B, H, N, d] -> ([B, N, H, d], None)."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        bias = as_key_bias(attention_mask, query.shape[0], key.shape[2])
        plain = query.shape == key.shape == value.shape and not dropout and not any_set(options)
        masked_otherwise = attention_mask is not None and bias is None
        if not plain or masked_otherwise or (causal and attention_mask is None):
            return self.fallback(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **options,
            )
        heads, head_dim = query.shape[1], query.shape[3]
        # [B, N, H, d] as the projections wrote them, then side by side.
        packed = torch.cat([t.transpose(1, 2).flatten(2) for t in (query, key, value)], dim=-1)
        out = attention(
            packed, heads, scale=scaling, key_bias=_in_range(bias, packed), impl=self.impl
        )
        return out.unflatten(-1, (heads, head_dim)), None


# Keyword arguments of a model's call that reach every layer and change nothing in it.
_NEUTRAL = {
    "interpolate_pos_encoding",
    "num_items_in_batch",
    "output_hidden_states",
    "return_dict",
    "use_cache",
}


def any_set(options: dict[str, Any]) -> bool:
    """Whether a keyword argument asks for something beyond plain attention."""
    return any(
        value is not None and value is not False
        for name, value in options.items()
        if name not in _NEUTRAL
    )


def as_key_bias(mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """The additive bias [B, keys] that `mask` amounts to, if its strides alone prove it is one.

    That is a boolean or additive [B or 1, 1, 1, keys] mask or an expanded view of one, so that
    every head and query reads the same row. (Comparing values would wait for the GPU.) None
    otherwise.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != keys:
        return None
    if mask.shape[0] not in (1, batch):
        return None
    if any(mask.shape[axis] != 1 and mask.stride(axis) != 0 for axis in (1, 2)):
        return None
    row = mask[:, 0, 0, :].expand(batch, keys)
    if row.dtype == torch.bool:
        return torch.zeros_like(row, dtype=torch.float32).masked_fill_(~row, float("-inf"))
    return row if row.is_floating_point() else None


def key_bias(x: Any, mask: Any) -> Tensor | None:
    """The key bias [B, N] of x [B, N, D] that `mask` is, in x's dtype or fp32; else None."""
    if not isinstance(x, Tensor) or x.dim() != 3:
        return None
    return _in_range(as_key_bias(mask, x.shape[0], x.shape[1]), x)


def _in_range(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """`bias` in a dtype that the operator takes beside x's."""
    return bias if bias is None or bias.dtype in (x.dtype, torch.float32) else bias.float()


class _Mask:
    """transformers' mask for SDPA; for plain padding as a view of the padding, nothing written."""

    def __init__(self, masking_utils: ModuleType) -> None:
        self.masking_utils = masking_utils

    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Any = None,
        attention_mask: Tensor | None = None,
        use_vmap: bool = False,
        allow_is_bidirectional_skip: bool = False,
        **options: Any,
    ) -> Tensor | None:
        """A boolean [B, 1, q_length, kv_length], True where a key is seen; None for no mask."""
        padding_only = (
            mask_function is self.masking_utils.bidirectional_mask_function and not use_vmap
        )
        whole = q_offset == kv_offset == 0 and allow_is_bidirectional_skip
        if padding_only and whole:
            if attention_mask is None:
                return None
            if attention_mask.shape == (batch_size, kv_length):
                return attention_mask.bool()[:, None, None, :].expand(-1, -1, q_length, -1)
        return self.masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **options,
        )
