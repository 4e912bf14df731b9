"""Fused classes for timm's VisionTransformer; imported only where timm is in use already."""

from __future__ import annotations

from typing import Any

import timm.layers
from timm.models import vision_transformer
from torch import Tensor, nn

from deit.fused_vit import modules


class FusedLayerNorm(modules.FusedLayerNorm, timm.layers.LayerNorm):
    """timm's LayerNorm on `deit.kernels.layer_norm`."""


class Masked:
    """timm's optional mask arguments: a call that uses one takes the original forward."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        given: dict[str, Any] = {}  # timm's of before 2026 know neither or only the first
        if attn_mask is not None:
            given["attn_mask"] = attn_mask
        if is_causal is not False:
            given["is_causal"] = is_causal
        if given:
            return modules.original_class(self).forward(self, x, **given)
        return super().forward(x)  # type: ignore[misc]


class FusedAttention(Masked, modules.FusedAttention, vision_transformer.Attention):
    """timm's Attention on `deit.kernels.linear` and `attention`."""

    IDENTITIES = ("q_norm", "k_norm", "norm")
    DROPOUTS = ("attn_drop", "proj_drop")

    def unsupported(self) -> str | None:
        if getattr(self, "gate", None) is not None:
            return "it gates its output"
        return super().unsupported()


class FusedMlp(modules.FusedMlp, timm.layers.Mlp):
    """timm's Mlp on `deit.kernels.gelu_mlp`."""

    IDENTITIES = ("norm",)
    DROPOUTS = ("drop1", "drop2")

    def unsupported(self) -> str | None:
        act = self.act
        if not exact_gelu(act):
            return f"its activation is {act}, not the exact GELU"
        return super().unsupported()

    def interrupted(self) -> str | None:
        return "act has a hook" if modules.hooked(self.act) else super().interrupted()


def exact_gelu(act: nn.Module) -> bool:
    """Whether `act` computes GELU by erf: torch's module or timm's wrapper of it."""
    if type(act) is nn.GELU:
        return act.approximate == "none"
    return type(act) is timm.layers.activations.GELU


class FusedBlock(Masked, modules.FusedBlock, vision_transformer.Block):
    """timm's Block with its residual additions in the products' epilogues."""

    def unsupported(self) -> str | None:
        children = self._modules
        for name in self.SCALES:
            if type(children.get(name)) not in (nn.Identity, vision_transformer.LayerScale):
                return f"{name} is a {type(children.get(name)).__name__}"
        for name in self.DROP_PATHS:
            if type(children.get(name)) not in (nn.Identity, timm.layers.DropPath):
                return f"{name} is a {type(children.get(name)).__name__}"
        return super().unsupported()

    def keep(self, index: int, x: Tensor) -> Tensor | None:
        drop: Any = self._modules[self.DROP_PATHS[index]]
        rate = getattr(drop, "drop_prob", None)
        if not rate or not drop.training:
            return None
        keep = x.new_empty(x.shape[0]).bernoulli_(1.0 - rate)
        return keep.div_(1.0 - rate) if drop.scale_by_keep and rate < 1.0 else keep


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {
    timm.layers.LayerNorm: FusedLayerNorm,
    vision_transformer.Attention: FusedAttention,
    timm.layers.Mlp: FusedMlp,
}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {vision_transformer.Block: FusedBlock}
