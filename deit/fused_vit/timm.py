"""Fused classes for timm's VisionTransformer; imported only where timm is in use already."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm import models
from timm.models import beit, deit, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from deit.fused_vit import blocks, feed_forward, modules
from deit.fused_vit.attention_interface import key_bias
from deit.fused_vit.embedding import ImageEmbedding
from deit.fused_vit.last_block import PrefixOnly
from deit.fused_vit.modules import hooked


class FusedLayerNorm(modules.FusedLayerNorm, timm.layers.LayerNorm):
    """timm's LayerNorm on `deit.kernels.layer_norm`."""


RMS_NORMS: dict[type[nn.Module], type[modules.Fused]] = {}
if hasattr(timm.layers, "RmsNorm"):

    class FusedRmsNorm(modules.FusedRmsNorm, timm.layers.RmsNorm):
        """timm's RmsNorm on `deit.kernels.rms_norm`."""

    RMS_NORMS[timm.layers.RmsNorm] = FusedRmsNorm
if hasattr(timm.layers, "RmsNormFp32"):

    class FusedRmsNormFp32(modules.FusedRmsNorm, timm.layers.RmsNormFp32):
        """timm's RmsNormFp32 on `deit.kernels.rms_norm`."""

        WIDENS = False

        def unsupported(self) -> str | None:
            if modules.weight_of(self) is not None and self.weight.dtype == torch.float64:
                return "it computes in fp32"
            return super().unsupported()

    RMS_NORMS[timm.layers.RmsNormFp32] = FusedRmsNormFp32


class Masked:
    """timm's optional mask arguments: a mask of keys alone is served, with any other the original
    forward runs.

    NaFlexVit makes masks of keys with use_key_only_attn_mask. Those that it makes by default tell
    padded queries from others, too.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        given: dict[str, Any] = {}  # timm's before 2026 know neither, or only the first
        if attn_mask is not None:
            given["attn_mask"] = attn_mask
        if is_causal is not False:
            given["is_causal"] = is_causal
        if given:
            bias = None if "is_causal" in given else key_bias(x, attn_mask)
            if bias is not None and self.runs_fused(x):  # type: ignore[attr-defined]
                return self.masked(x, bias)
            return modules.original_class(self).forward(self, x, **given)
        return super().forward(x)  # type: ignore[misc]

    def masked(self, x: Tensor, bias: Tensor) -> Tensor:
        """The fused forward, with `bias` [B, N] added to the keys' scores."""
        raise NotImplementedError


class FusedAttention(Masked, modules.FusedAttention, vision_transformer.Attention):
    """timm's Attention on `deit.kernels.linear` and `attention`."""

    IDENTITIES = ("q_norm", "k_norm", "norm")
    DROPOUTS = ("attn_drop", "proj_drop")

    def unsupported(self) -> str | None:
        if getattr(self, "gate", None) is not None:
            return "it gates its output"
        return super().unsupported()

    def masked(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.attend(x, key_bias=bias)


ACTIVATIONS: dict[type[nn.Module], str] = {
    timm.layers.activations.GELU: "gelu",
    timm.layers.activations.GELUTanh: "gelu_tanh",
    timm.layers.activations.QuickGELU: "quick_gelu",
}


class FusedMlp(feed_forward.FusedMlp, timm.layers.Mlp):
    """timm's Mlp on `deit.kernels.gelu_mlp`."""

    IDENTITIES = ("norm",)
    DROPOUTS = ("drop1", "drop2")
    ACTIVATION = "act"
    ACTIVATIONS = ACTIVATIONS


class FusedSwiGLU(feed_forward.FusedGatedMlp, timm.layers.SwiGLU):
    """timm's SwiGLU, gate and value apart, on `deit.kernels.glu_mlp`."""

    LINEARS = ("fc1_g", "fc1_x", "fc2")
    DROPOUTS = ("drop1", "drop2")
    ACTIVATION = "act"
    ACTIVATIONS = ACTIVATIONS
    NORM = "norm"
    NORM_KINDS = (nn.LayerNorm, timm.layers.LayerNorm)


class FusedGluMlp(feed_forward.FusedGatedMlp, timm.layers.GluMlp):
    """timm's GluMlp (SwiGLUPacked), gate and value in one weight, on `deit.kernels.glu_mlp`."""

    LINEARS = ("fc1", "fc2")
    DROPOUTS = ("drop1", "drop2")
    ACTIVATION = "act"
    ACTIVATIONS = ACTIVATIONS
    NORM = "norm"
    NORM_KINDS = (nn.LayerNorm, timm.layers.LayerNorm)

    def gate_and_up(self) -> tuple[feed_forward.Affine, feed_forward.Affine]:
        packed: Any = self._modules["fc1"]
        first, last = packed.weight.chunk(2)
        first_bias, last_bias = (None, None) if packed.bias is None else packed.bias.chunk(2)
        halves = (first, first_bias), (last, last_bias)
        return halves[::-1] if self.gate_last else halves

    def unsupported(self) -> str | None:
        if self.chunk_dim != -1:
            return "it is of convolutions"
        return super().unsupported()


class FusedBlock(Masked, blocks.FusedBlock, vision_transformer.Block):
    """timm's Block with its residual additions in the products' epilogues."""

    SCALE_KINDS = (nn.Identity, vision_transformer.LayerScale)
    DROP_PATH_KINDS = (nn.Identity, timm.layers.DropPath)
    STANDS_FOR = (*SCALE_KINDS, *DROP_PATH_KINDS)

    def masked(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.advance(x, key_bias=bias)

    def keep(self, index: int, x: Tensor) -> Tensor | None:
        drop: Any = self._modules[self.DROP_PATHS[index]]
        rate = getattr(drop, "drop_prob", None)
        if not rate or not drop.training:
            return None
        keep = x.new_empty(x.shape[0]).bernoulli_(1.0 - rate)
        return keep.div_(1.0 - rate) if drop.scale_by_keep and rate < 1.0 else keep


class ClassifiesByPrefix(ImageEmbedding, PrefixOnly):
    """What timm's two vision transformers share."""

    STEPS = ("forward_features", "_pos_embed")
    STANDS_FOR = (nn.Sequential, timm.layers.PatchEmbed, nn.Conv2d, nn.Dropout, nn.Identity)

    def prefix_tokens(self) -> Tensor:
        if self.rows() == 1:
            return self.cls_token
        # As rows, for the gradients' strides (deit/model.py).
        tokens = [token.flatten(0, 1) for token in (self.cls_token, self.dist_token)]
        return torch.cat(tokens)[None]

    def by_steps(self, images: Tensor) -> Tensor:
        return self._pos_embed(self.patch_embed(images))

    def why_steps(self) -> str | None:
        patches = self.patch_embed
        if type(patches) is not timm.layers.PatchEmbed:
            return f"patch_embed is a {type(patches).__name__}"
        if self.cls_token is None or self.pos_embed is None or self.no_embed_class:
            return "positions are not added to a class token"
        if getattr(self, "reg_token", None) is not None:
            return "it has register tokens"
        sized = not (self.dynamic_img_size or getattr(patches, "dynamic_img_pad", False))
        if not sized or not patches.flatten:
            return "it takes images of any size"
        if type(patches.norm) is not nn.Identity or hooked(patches.norm):
            return f"patch_embed.norm is a {type(patches.norm).__name__}, or has a hook"
        dropped = self.pos_drop
        if hooked(dropped) or (dropped.training and getattr(dropped, "p", 0.0) > 0.0):
            return "pos_drop drops, or has a hook"
        return super().why_steps()

    def embedded(self, images: Tensor) -> Tensor:
        sizes = self.patch_embed.img_size
        if images.dim() != 4 or sizes is None or tuple(images.shape[2:]) != tuple(sizes):
            return self.by_steps(images)  # which says what is wrong with them
        return super().embedded(images)

    def unsupported(self) -> str | None:
        if not _FEATURES_KNOWN:
            return f"timm {timm.__version__} computes features by other steps than are known here"
        return super().unsupported()

    def interrupted(self) -> str | None:
        if self.global_pool != "token" or self.attn_pool is not None:
            return f"global_pool={self.global_pool!r} reads every token"
        if self.grad_checkpointing:
            return "gradient checkpointing is on"
        return super().interrupted()

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Any:  # [B, 3, H, W] -> [B, C]
        if attn_mask is not None or is_causal is not False:
            return modules.original_class(self).forward(self, x, attn_mask, is_causal)
        if not self.runs_fused(x):
            return super().forward(x)  # type: ignore[misc]
        x = self.norm_pre(self.patch_drop(self.embedded(x)))
        return self.forward_head(self.prefix_features(x))


class FusedVisionTransformer(ClassifiesByPrefix, vision_transformer.VisionTransformer):
    """timm's VisionTransformer with the last block for the class token alone."""

    ROWS = 1


class FusedVisionTransformerDistilled(ClassifiesByPrefix, deit.VisionTransformerDistilled):
    """timm's distilled DeiT with the last block for the class and distillation tokens alone."""

    ROWS = 2


# `forward` above spells out the steps of timm's forward_features, the same since 0.9. A timm that
# takes another step would silently lose it there.
_STEPS = {"patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks", "norm"}
_FEATURES_KNOWN = (
    _STEPS
    <= set(vision_transformer.VisionTransformer.forward_features.__code__.co_names)
    <= _STEPS | {"grad_checkpointing", "torch", "jit", "is_scripting", "checkpoint_seq"}
)

LEAVES: dict[type[nn.Module], type[modules.Fused]] = {
    timm.layers.LayerNorm: FusedLayerNorm,
    vision_transformer.Attention: FusedAttention,
    timm.layers.Mlp: FusedMlp,
    timm.layers.SwiGLU: FusedSwiGLU,
    timm.layers.GluMlp: FusedGluMlp,
    **RMS_NORMS,
}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {vision_transformer.Block: FusedBlock}
_PAIRS = "its attention adds a bias for every pair of positions"
REFUSED: dict[type[nn.Module], str] = {
    beit.Attention: _PAIRS,
    beit.Block: _PAIRS,
    vision_transformer_relpos.RelPosAttention: _PAIRS,
    vision_transformer_relpos.RelPosBlock: _PAIRS,
    vision_transformer_relpos.ResPostRelPosBlock: _PAIRS,
    vision_transformer.ParallelScalingBlock: "its attention and its MLP share a norm and a product",
    vision_transformer.ParallelThingsBlock: "its attentions and its MLPs run side by side",
    vision_transformer.ResPostBlock: "its norms come after its branches",
}
if hasattr(models, "naflexvit"):
    REFUSED[models.naflexvit.NaFlexVit] = (
        "its blocks run fused, in batches of many sizes with use_key_only_attn_mask=True alone"
    )
ROOTS: dict[type[nn.Module], type[modules.Fused]] = {
    vision_transformer.VisionTransformer: FusedVisionTransformer,
    deit.VisionTransformerDistilled: FusedVisionTransformerDistilled,
}
