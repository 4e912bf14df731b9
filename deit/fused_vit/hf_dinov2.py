"""Fused classes for Hugging Face's DINOv2, with and without registers (transformers 5)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.dinov2 import modeling_dinov2 as plain
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers

from deit.fused_vit import deit_model, feed_forward, huggingface, modules


class FusedSwiGLU(feed_forward.FusedGatedMlp):
    """Over the SwiGLU of the giants."""

    ACTIVATION = "act_fn"
    ACTIVATIONS: ClassVar[dict[type[nn.Module], str]] = {SiLUActivation: "silu"}

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        return super().forward(x)


class FusedLayer(huggingface.FusedLayer):
    """Over a layer with LayerScale and stochastic depth."""

    PARTS = (
        ("norm1", deit_model.FusedLayerNorm),
        ("attention", huggingface.FusedAttention),
        ("norm2", deit_model.FusedLayerNorm),
        ("mlp", feed_forward.FeedForward),
    )
    SCALES = ("layer_scale1", "layer_scale2")
    DROP_PATHS = ("drop_path",)
    DROPOUTS = ()

    def gamma(self, index: int) -> Tensor | None:
        scale: Any = self._modules[self.SCALES[index]]
        return scale.lambda1

    def keep(self, index: int, x: Tensor) -> Tensor | None:
        drop: Any = self._modules["drop_path"]
        rate = getattr(drop, "drop_prob", 0.0)
        if not rate or not drop.training:
            return None
        # The numbers that the original draws, in its shape and dtype.
        drawn = torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
        return drawn.add_(1 - rate).floor_().div_(1 - rate).flatten()


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
REFUSED: dict[type[nn.Module], str] = {}

if huggingface.served(plain.Dinov2Layer, plain.Dinov2Attention, REFUSED):

    class FusedDinov2Attention(huggingface.FusedAttention, plain.Dinov2Attention):
        """transformers' Dinov2Attention on `deit.kernels.linear` and `attention`."""

    class FusedDinov2MLP(huggingface.FusedMlp, plain.Dinov2MLP):
        """transformers' Dinov2MLP on `deit.kernels.gelu_mlp`."""

    class FusedDinov2SwiGLUFFN(FusedSwiGLU, plain.Dinov2SwiGLUFFN):
        """transformers' Dinov2SwiGLUFFN on `deit.kernels.glu_mlp`."""

    class FusedDinov2Layer(FusedLayer, plain.Dinov2Layer):
        """transformers' Dinov2Layer with its residual additions in the products' epilogues."""

        SCALE_KINDS = (plain.Dinov2LayerScale,)
        DROP_PATH_KINDS = (nn.Identity, plain.Dinov2DropPath)
        STANDS_FOR = (*SCALE_KINDS, *DROP_PATH_KINDS)

    LEAVES |= {
        plain.Dinov2Attention: FusedDinov2Attention,
        plain.Dinov2MLP: FusedDinov2MLP,
        plain.Dinov2SwiGLUFFN: FusedDinov2SwiGLUFFN,
    }
    BLOCKS |= {plain.Dinov2Layer: FusedDinov2Layer}

if huggingface.served(
    registers.Dinov2WithRegistersLayer, registers.Dinov2WithRegistersAttention, REFUSED
):

    class FusedDinov2WithRegistersAttention(
        huggingface.FusedAttention, registers.Dinov2WithRegistersAttention
    ):
        """transformers' Dinov2WithRegistersAttention on `deit.kernels.linear` and `attention`."""

    class FusedDinov2WithRegistersMLP(huggingface.FusedMlp, registers.Dinov2WithRegistersMLP):
        """transformers' Dinov2WithRegistersMLP on `deit.kernels.gelu_mlp`."""

    class FusedDinov2WithRegistersSwiGLUFFN(FusedSwiGLU, registers.Dinov2WithRegistersSwiGLUFFN):
        """transformers' Dinov2WithRegistersSwiGLUFFN on `deit.kernels.glu_mlp`."""

    class FusedDinov2WithRegistersLayer(FusedLayer, registers.Dinov2WithRegistersLayer):
        """transformers' Dinov2WithRegistersLayer, its residual additions in epilogues."""

        SCALE_KINDS = (registers.Dinov2WithRegistersLayerScale,)
        DROP_PATH_KINDS = (nn.Identity, registers.Dinov2WithRegistersDropPath)
        STANDS_FOR = (*SCALE_KINDS, *DROP_PATH_KINDS)

    LEAVES |= {
        registers.Dinov2WithRegistersAttention: FusedDinov2WithRegistersAttention,
        registers.Dinov2WithRegistersMLP: FusedDinov2WithRegistersMLP,
        registers.Dinov2WithRegistersSwiGLUFFN: FusedDinov2WithRegistersSwiGLUFFN,
    }
    BLOCKS |= {registers.Dinov2WithRegistersLayer: FusedDinov2WithRegistersLayer}
