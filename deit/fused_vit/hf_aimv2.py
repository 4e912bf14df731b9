"""Fused classes for Hugging Face's AIMv2 (transformers 5).

One class of layers makes both towers. For texts, whose mask is causal, it takes the original
forward.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.models.aimv2 import modeling_aimv2 as aimv2

from deit.fused_vit import feed_forward, huggingface, modules

LEAVES: dict[type[nn.Module], type[modules.Fused]] = {}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
REFUSED: dict[type[nn.Module], str] = {}

if huggingface.served(aimv2.Aimv2EncoderLayer, aimv2.Aimv2Attention, REFUSED):

    class FusedAimv2RMSNorm(modules.FusedRmsNorm, aimv2.Aimv2RMSNorm):
        """transformers' Aimv2RMSNorm on `deit.kernels.rms_norm`."""

        EPS = "variance_epsilon"

        def unsupported(self) -> str | None:
            if modules.weight_of(self).dtype == torch.float64:
                return "it computes in fp32"
            return super().unsupported()

        def forward(self, hidden_states: Tensor) -> Tensor:  # [..., D] -> [..., D]
            return super().forward(hidden_states)

    class FusedAimv2Attention(huggingface.FusedAttention, aimv2.Aimv2Attention):
        """transformers' Aimv2Attention on `deit.kernels.linear` and `attention`."""

        LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj")
        SCALE, DROPOUT = "scale", "dropout"

    class FusedAimv2MLP(feed_forward.FusedGatedMlp, aimv2.Aimv2MLP):
        """transformers' Aimv2MLP on `deit.kernels.glu_mlp`."""

        ACTIVATION = "act_fn"
        ACTIVATIONS: ClassVar[dict[type[nn.Module], str]] = huggingface.FusedMlp.ACTIVATIONS

        def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
            return super().forward(x)

    class FusedAimv2EncoderLayer(huggingface.FusedLayer, aimv2.Aimv2EncoderLayer):
        """transformers' Aimv2EncoderLayer, its residual additions in epilogues."""

        PARTS = (
            ("rms_norm1", FusedAimv2RMSNorm),
            ("attention", FusedAimv2Attention),
            ("rms_norm2", FusedAimv2RMSNorm),
            ("ffn", FusedAimv2MLP),
        )
        DROPOUTS = ()

    LEAVES |= {
        aimv2.Aimv2RMSNorm: FusedAimv2RMSNorm,
        aimv2.Aimv2Attention: FusedAimv2Attention,
        aimv2.Aimv2MLP: FusedAimv2MLP,
    }
    BLOCKS |= {aimv2.Aimv2EncoderLayer: FusedAimv2EncoderLayer}
