"""Fused classes for Hugging Face's CLIP, MetaCLIP 2, SigLIP and SigLIP 2 (transformers 5).

One class of layers makes both towers of each. SigLIP's texts are fused too. The layers of CLIP's
and MetaCLIP's take the original forward for texts, whose attention is causal.
"""

from __future__ import annotations

from torch import nn
from transformers.models.clip import modeling_clip
from transformers.models.metaclip_2 import modeling_metaclip_2
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2

from deit.fused_vit import deit_model, feed_forward, huggingface, modules


class FusedAttention(huggingface.FusedAttention):
    """Over the attention that all of them have."""

    LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj")
    SCALE, DROPOUT = "scale", "dropout"


class FusedLayer(huggingface.FusedLayer):
    """Over the layer that all of them have."""

    PARTS = (
        ("layer_norm1", deit_model.FusedLayerNorm),
        ("self_attn", FusedAttention),
        ("layer_norm2", deit_model.FusedLayerNorm),
        ("mlp", feed_forward.FeedForward),
    )
    DROPOUTS = ()


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
REFUSED: dict[type[nn.Module], str] = {}

for _library, _prefix in (
    (modeling_clip, "CLIP"),
    (modeling_metaclip_2, "MetaClip2"),
    (modeling_siglip, "Siglip"),
    (modeling_siglip2, "Siglip2"),
):
    _attention, _mlp, _layer = (
        getattr(_library, _prefix + part) for part in ("Attention", "MLP", "EncoderLayer")
    )
    if huggingface.served(_layer, _attention, REFUSED):
        LEAVES[_attention] = huggingface.over(_attention, FusedAttention, globals())
        LEAVES[_mlp] = huggingface.over(_mlp, huggingface.FusedMlp, globals())
        BLOCKS[_layer] = huggingface.over(_layer, FusedLayer, globals())
