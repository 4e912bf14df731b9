"""Fused classes for `deit.model` and for torch's own LayerNorm."""

from __future__ import annotations

from torch import Tensor, nn

from deit import model
from deit.fused_vit import modules


class FusedLayerNorm(modules.FusedLayerNorm, nn.LayerNorm):
    """nn.LayerNorm on `deit.kernels.layer_norm`."""


class FusedAttention(modules.FusedAttention, model.Attention):
    """deit.model.Attention on `deit.kernels.linear` and `attention`."""


class FusedMlp(modules.FusedMlp, model.Mlp):
    """deit.model.Mlp on `deit.kernels.gelu_mlp`."""


class FusedBlock(modules.FusedBlock, model.Block):
    """deit.model.Block with its residual additions in the products' epilogues."""

    SCALES = ()  # type: ignore[assignment]
    DROP_PATHS = ("drop_path", "drop_path")

    def gamma(self, index: int) -> None:
        return None

    def keep(self, index: int, x: Tensor) -> Tensor | None:
        return self.drop_path.keep(x)


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {
    nn.LayerNorm: FusedLayerNorm,
    model.Attention: FusedAttention,
    model.Mlp: FusedMlp,
}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {model.Block: FusedBlock}
