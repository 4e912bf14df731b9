"""Fused classes for Hugging Face's Pixio (transformers 5): ViT's layers with stochastic depth."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.pixio import modeling_pixio as pixio

from deit.fused_vit import huggingface, modules

LEAVES: dict[type[nn.Module], type[modules.Fused]] = {}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
REFUSED: dict[type[nn.Module], str] = {}

# The MLP of transformers 5.17 has other names.
_NAMES = inspect.signature(pixio.PixioMLP.forward).parameters
_ACTIVATION = "activation_fn" if "hidden_states" in _NAMES else "activation"

if huggingface.served(pixio.PixioLayer, pixio.PixioAttention, REFUSED):

    class FusedPixioAttention(huggingface.FusedAttention, pixio.PixioAttention):
        """transformers' PixioAttention on `deit.kernels.linear` and `attention`."""

    class FusedPixioMLP(huggingface.FusedMlp, pixio.PixioMLP):
        """transformers' PixioMLP on `deit.kernels.gelu_mlp`."""

        ACTIVATION = _ACTIVATION

    class FusedPixioLayer(huggingface.FusedLayer, pixio.PixioLayer):
        """transformers' PixioLayer with its residual additions in the products' epilogues."""

        DROP_PATHS = ("drop_path",)
        DROP_PATH_KINDS = (nn.Identity, pixio.PixioDropPath)
        STANDS_FOR = DROP_PATH_KINDS

        def keep(self, index: int, x: Tensor) -> Tensor | None:
            drop: Any = self._modules["drop_path"]
            rate = getattr(drop, "drop_prob", 0.0)
            if not rate or not drop.training:
                return None
            # The numbers that the original draws, in its shape and dtype.
            drawn = torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
            return drawn.add_(1 - rate).floor_().div_(1 - rate).flatten()

    LEAVES |= {pixio.PixioAttention: FusedPixioAttention, pixio.PixioMLP: FusedPixioMLP}
    BLOCKS |= {pixio.PixioLayer: FusedPixioLayer}
