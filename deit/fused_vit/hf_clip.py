"""Fused classes for Hugging Face's CLIP, SigLIP and SigLIP 2 (transformers 5).

One class of layers makes both towers of each. SigLIP's texts are fused too; CLIP's layers take the
original forward for texts, whose attention is causal.
"""

from __future__ import annotations

from torch import nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2

from deit.fused_vit import deit_model, huggingface, modules


class FusedAttention(huggingface.FusedAttention):
    """Over the attention that all three have."""

    LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj")
    SCALE, DROPOUT = "scale", "dropout"


class FusedLayer(huggingface.FusedLayer):
    """Over the layer that all three have."""

    PARTS = (
        ("layer_norm1", deit_model.FusedLayerNorm),
        ("self_attn", FusedAttention),
        ("layer_norm2", deit_model.FusedLayerNorm),
        ("mlp", modules.FeedForward),
    )
    DROPOUTS = ()


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
REFUSED: dict[type[nn.Module], str] = {}

if huggingface.served(clip.CLIPEncoderLayer, clip.CLIPAttention, REFUSED):

    class FusedCLIPAttention(FusedAttention, clip.CLIPAttention):
        """transformers' CLIPAttention on `deit.kernels.linear` and `attention`."""

    class FusedCLIPMLP(huggingface.FusedMlp, clip.CLIPMLP):
        """transformers' CLIPMLP on `deit.kernels.gelu_mlp`."""

    class FusedCLIPEncoderLayer(FusedLayer, clip.CLIPEncoderLayer):
        """transformers' CLIPEncoderLayer, its residual additions in the products' epilogues."""

    LEAVES |= {clip.CLIPAttention: FusedCLIPAttention, clip.CLIPMLP: FusedCLIPMLP}
    BLOCKS |= {clip.CLIPEncoderLayer: FusedCLIPEncoderLayer}

if huggingface.served(siglip.SiglipEncoderLayer, siglip.SiglipAttention, REFUSED):

    class FusedSiglipAttention(FusedAttention, siglip.SiglipAttention):
        """transformers' SiglipAttention on `deit.kernels.linear` and `attention`."""

    class FusedSiglipMLP(huggingface.FusedMlp, siglip.SiglipMLP):
        """transformers' SiglipMLP on `deit.kernels.gelu_mlp`."""

    class FusedSiglipEncoderLayer(FusedLayer, siglip.SiglipEncoderLayer):
        """transformers' SiglipEncoderLayer, its residual additions in the products' epilogues."""

    LEAVES |= {siglip.SiglipAttention: FusedSiglipAttention, siglip.SiglipMLP: FusedSiglipMLP}
    BLOCKS |= {siglip.SiglipEncoderLayer: FusedSiglipEncoderLayer}

if huggingface.served(siglip2.Siglip2EncoderLayer, siglip2.Siglip2Attention, REFUSED):

    class FusedSiglip2Attention(FusedAttention, siglip2.Siglip2Attention):
        """transformers' Siglip2Attention on `deit.kernels.linear` and `attention`."""

    class FusedSiglip2MLP(huggingface.FusedMlp, siglip2.Siglip2MLP):
        """transformers' Siglip2MLP on `deit.kernels.gelu_mlp`."""

    class FusedSiglip2EncoderLayer(FusedLayer, siglip2.Siglip2EncoderLayer):
        """transformers' Siglip2EncoderLayer, its residual additions in the products' epilogues."""

    LEAVES |= {siglip2.Siglip2Attention: FusedSiglip2Attention, siglip2.Siglip2MLP: FusedSiglip2MLP}
    BLOCKS |= {siglip2.Siglip2EncoderLayer: FusedSiglip2EncoderLayer}
