"""Fused classes for Hugging Face's DINOv3ViT, as transformers 5 lays it out.

Imported only where transformers' models are in use already.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from deit.fused_vit import deit_model, feed_forward, huggingface, modules, rotary
from deit.fused_vit.attention_interface import any_set
from deit.fused_vit.rotary import Positions
from deit.kernels.attention.reference import turned


def _rotates_as_known() -> bool:
    """Whether this transformers' tables rotate as is assumed here."""
    x, table = torch.arange(240.0).reshape(2, 3, 5, 8), torch.arange(24.0).reshape(3, 8)
    sin, cos = table, table + 24
    want = torch.cat([x[:, :, :2], x[:, :, 2:] * cos + turned(x[:, :, 2:], False) * sin], dim=2)
    found = dinov3.apply_rotary_pos_emb(x, x, cos, sin)
    return all(torch.equal(each, want) for each in found)


_KNOWN = _rotates_as_known()


def _positions(x: Tensor, embeddings: Any) -> Positions | None:
    """The model's (cos, sin), each [N - prefix, d]; None for what only the original can take."""
    if not isinstance(embeddings, tuple) or len(embeddings) != 2:
        return None
    cos, sin = embeddings
    if not all(isinstance(table, Tensor) and table.dim() == 2 for table in (cos, sin)):
        return None
    return Positions(sin, cos, x.shape[1] - sin.shape[0], False)


class FusedAttention(rotary.RotaryAttention, dinov3.DINOv3ViTAttention):
    """transformers' DINOv3ViTAttention on `deit.kernels.linear` and `rotary_attention`."""

    PROJ = "o_proj"
    NORMS = ("", "", "")

    def geometry(self) -> tuple[int, float]:
        return self.num_heads, self.scaling

    def unsupported(self) -> str | None:
        if not _KNOWN:
            return "this version of transformers rotates otherwise than is known here"
        return "it is causal" if self.is_causal else super().unsupported()

    def interrupted(self) -> str | None:
        if self.training and self.dropout > 0.0:
            return f"attention drops {self.dropout} in training"
        return super().interrupted()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # The eager form owes its caller the attention weights where it is called by itself.
        weights = self.config._attn_implementation == "eager"
        plain = attention_mask is None and not weights and not any_set(kwargs)
        if plain and self.runs_fused(hidden_states):
            rope = _positions(hidden_states, position_embeddings)
            if rope is not None and self.takes(hidden_states, rope):
                return self.attend(hidden_states, rope=rope), None
        return modules.original_class(self).forward(
            self, hidden_states, attention_mask, position_embeddings, **kwargs
        )


class FusedMlp(huggingface.FusedMlp, dinov3.DINOv3ViTMLP):
    """transformers' DINOv3ViTMLP on `deit.kernels.gelu_mlp`."""

    LINEARS = ("up_proj", "down_proj")
    ACTIVATION = "act_fn"

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        return super().forward(x)


class FusedGatedMlp(feed_forward.FusedGatedMlp, dinov3.DINOv3ViTGatedMLP):
    """transformers' DINOv3ViTGatedMLP on `deit.kernels.glu_mlp`."""

    ACTIVATION = "act_fn"
    ACTIVATIONS: ClassVar[dict[type[nn.Module], str]] = huggingface.FusedMlp.ACTIVATIONS

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        return super().forward(x)


class FusedLayer(rotary.RotaryBlock, dinov3.DINOv3ViTLayer):
    """transformers' DINOv3ViTLayer with its residual additions in the products' epilogues."""

    PARTS = (
        ("norm1", deit_model.FusedLayerNorm),
        ("attention", rotary.RotaryAttention),
        ("norm2", deit_model.FusedLayerNorm),
        ("mlp", feed_forward.FeedForward),
    )
    SCALES = ("layer_scale1", "layer_scale2")
    SCALE_KINDS = (dinov3.DINOv3ViTLayerScale,)
    DROP_PATHS = ("drop_path",)
    DROP_PATH_KINDS = (nn.Identity, dinov3.Dinov3ViTDropPath)
    STANDS_FOR = (*SCALE_KINDS, *DROP_PATH_KINDS)

    watched = huggingface.FusedLayer.watched

    def gamma(self, index: int) -> Tensor | None:
        scale: Any = self._modules[self.SCALES[index]]
        return scale.lambda1

    def keep(self, index: int, x: Tensor) -> Tensor | None:
        drop: Any = self._modules["drop_path"]
        rate = getattr(drop, "drop_prob", 0.0)
        if rate == 0.0 or not drop.training:
            return None
        drawn = torch.rand((x.shape[0], *(1,) * (x.dim() - 1)), dtype=x.dtype, device=x.device)
        return torch.floor(drawn + (1 - rate)).flatten() / (1 - rate)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        plain = attention_mask is None and not any_set(kwargs)
        if plain and self.runs_fused(hidden_states):
            rope = _positions(hidden_states, position_embeddings)
            attention: Any = self._modules["attention"]
            if rope is not None and attention.takes(hidden_states, rope):
                return self.advance(hidden_states, rope=rope)
        return modules.original_class(self).forward(
            self, hidden_states, attention_mask, position_embeddings, **kwargs
        )


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {
    dinov3.DINOv3ViTAttention: FusedAttention,
    dinov3.DINOv3ViTMLP: FusedMlp,
    dinov3.DINOv3ViTGatedMLP: FusedGatedMlp,
}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {dinov3.DINOv3ViTLayer: FusedLayer}
