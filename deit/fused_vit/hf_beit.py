"""Why Hugging Face's BEiT and Data2VecVision have no fused layers."""

from __future__ import annotations

from torch import nn
from transformers.models.beit import modeling_beit
from transformers.models.data2vec import modeling_data2vec_vision

from deit.fused_vit import modules

LEAVES: dict[type[nn.Module], type[modules.Fused]] = {}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
_PAIRS = "its attention adds a bias for every pair of positions"
REFUSED: dict[type[nn.Module], str] = {
    modeling_beit.BeitLayer: _PAIRS,
    modeling_data2vec_vision.Data2VecVisionLayer: _PAIRS,
}
