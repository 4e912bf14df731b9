"""Fused classes for timm's Eva: EVA-02, DINOv3, RoPE ViTs, Perception Encoder.

Imported only where timm is in use already.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.layers import pos_embed_sincos
from timm.models import eva
from torch import Tensor, nn

from deit.fused_vit import feed_forward, modules, rotary
from deit.fused_vit import timm as timm_models
from deit.fused_vit.rotary import Positions
from deit.kernels.attention.reference import turned


def _rotates_as_known() -> bool:
    """Whether this timm's tables, [N, 2 * d] or [H, N, 2 * d], rotate as is assumed here.

    timm before 2025 took the first of three axes for the batch and knew no pairs of halves.
    """
    x, head = torch.arange(192.0).reshape(2, 3, 4, 8), torch.arange(48.0).reshape(4, 12)[:, :8]
    for table in (head.repeat(1, 2), torch.stack([head.repeat(1, 2) + i for i in range(3)])):
        sin, cos = table.chunk(2, dim=-1)
        for half in (False, True):
            try:
                found = pos_embed_sincos.apply_rot_embed_cat(x, table, half=half)
            except (TypeError, RuntimeError):
                return False
            if not torch.equal(found, x * cos + turned(x, not half) * sin):
                return False
    return True


_KNOWN = _rotates_as_known()


def _positions(attn: Any, rope: Tensor | None) -> Any:
    """What `rope` is to this attention; NotImplemented for what only the original can take."""
    if rope is None:
        return None
    if not isinstance(rope, Tensor) or rope.dim() not in (2, 3):
        return NotImplemented
    sin, cos = rope.chunk(2, dim=-1)
    interleaved = not getattr(attn, "rotate_half", False)
    return Positions(sin, cos, attn.num_prefix_tokens, interleaved)


class FusedAttention(rotary.RotaryAttention):
    """Over EvaAttention and AttentionRope."""

    DROPOUTS = ("attn_drop", "proj_drop")
    BY_HEAD = (*rotary.RotaryAttention.BY_HEAD, timm.layers.LayerNorm, timm.layers.RmsNorm)

    def unsupported(self) -> str | None:
        if not _KNOWN:
            return f"timm {timm.__version__} rotates otherwise than is known here"
        if getattr(self, "num_kv_groups", 1) != 1:
            return "it groups its queries"
        return super().unsupported()

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        if attn_mask is None and is_causal is False and self.runs_fused(x):
            positions = _positions(self, rope)
            if positions is not NotImplemented and self.takes(x, positions):
                return self.attend(x, rope=positions)
        return modules.original_class(self).forward(self, x, **_given(rope, attn_mask, is_causal))


def _given(rope: Any, attn_mask: Any, is_causal: Any) -> dict[str, Any]:
    """The arguments that are not at their defaults: timm's before 2026 do not know all."""
    given = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal}
    return {
        name: value for name, value in given.items() if value is not None and value is not False
    }


class FusedEvaAttention(FusedAttention, eva.EvaAttention):
    """timm's EvaAttention on `deit.kernels.linear` and `rotary_attention`."""

    def projection(self) -> tuple[Any, Any]:
        weight, bias = super().projection()
        if self.q_bias is not None:  # beside a qkv without bias
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return weight, bias

    def unsupported(self) -> str | None:
        reason = super().unsupported()
        if reason is None and self.q_bias is not None and self.qkv.bias is not None:
            return "qkv has a bias beside q_bias, k_bias and v_bias"
        return reason


class FusedBlock(rotary.RotaryBlock, eva.EvaBlock):
    """timm's EvaBlock with its residual additions in the products' epilogues."""

    PARTS = (
        ("norm1", modules.FusedNorm),
        ("attn", rotary.RotaryAttention),
        ("norm2", modules.FusedNorm),
        ("mlp", feed_forward.FeedForward),
    )
    DROP_PATH_KINDS = (nn.Identity, timm.layers.DropPath)
    STANDS_FOR = DROP_PATH_KINDS

    def gamma(self, index: int) -> Tensor | None:
        return self.gamma_1 if index == 0 else self.gamma_2

    keep = timm_models.FusedBlock.keep

    def unsupported(self) -> str | None:
        for name in ("gamma_1", "gamma_2"):
            gamma = self._parameters.get(name)
            what = None if gamma is None else modules.unreadable(gamma)
            if what is not None:
                return f"{name} is {what}"
        return super().unsupported()

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        if attn_mask is None and is_causal is False and self.runs_fused(x):
            attn: Any = self._modules["attn"]
            positions = _positions(attn, rope)
            if positions is not NotImplemented and attn.takes(x, positions):
                return self.advance(x, rope=positions)
        return modules.original_class(self).forward(self, x, **_given(rope, attn_mask, is_causal))


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {
    eva.EvaAttention: FusedEvaAttention,
}
if hasattr(timm.layers, "AttentionRope"):

    class FusedAttentionRope(FusedAttention, timm.layers.AttentionRope):
        """timm's AttentionRope on `deit.kernels.linear` and `rotary_attention`."""

    LEAVES[timm.layers.AttentionRope] = FusedAttentionRope
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {eva.EvaBlock: FusedBlock}
