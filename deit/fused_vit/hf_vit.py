"""Fused classes for Hugging Face's models with ViT's layers under names of their own.

These are I-JEPA, ViT-MAE, ViT-MSN and ViViT, as transformers 5 lays them out.
"""

from __future__ import annotations

from torch import nn
from transformers.models.ijepa import modeling_ijepa
from transformers.models.vit_mae import modeling_vit_mae
from transformers.models.vit_msn import modeling_vit_msn
from transformers.models.vivit import modeling_vivit

from deit.fused_vit import huggingface, modules

LEAVES: dict[type[nn.Module], type[modules.Fused]] = {}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
REFUSED: dict[type[nn.Module], str] = {}

for _library, _prefix in (
    (modeling_ijepa, "IJepa"),
    (modeling_vit_mae, "ViTMAE"),
    (modeling_vit_msn, "ViTMSN"),
    (modeling_vivit, "Vivit"),
):
    _attention, _mlp, _layer = (
        getattr(_library, _prefix + part) for part in ("Attention", "MLP", "Layer")
    )
    if huggingface.served(_layer, _attention, REFUSED):
        LEAVES[_attention] = huggingface.over(_attention, huggingface.FusedAttention, globals())
        LEAVES[_mlp] = huggingface.over(_mlp, huggingface.FusedMlp, globals())
        BLOCKS[_layer] = huggingface.over(_layer, huggingface.FusedLayer, globals())
