"""Fused classes for `deit.model` and for torch's own LayerNorm and RMSNorm."""

from __future__ import annotations

from torch import Tensor, nn

from deit import model
from deit.fused_vit import blocks, feed_forward, modules
from deit.fused_vit.embedding import ImageEmbedding
from deit.fused_vit.last_block import PrefixOnly


class FusedLayerNorm(modules.FusedLayerNorm, nn.LayerNorm):
    """nn.LayerNorm on `deit.kernels.layer_norm`."""


class FusedRMSNorm(modules.FusedRmsNorm, nn.RMSNorm):
    """nn.RMSNorm on `deit.kernels.rms_norm`."""


class FusedAttention(modules.FusedAttention, model.Attention):
    """deit.model.Attention on `deit.kernels.linear` and `attention`."""


class FusedMlp(feed_forward.FusedMlp, model.Mlp):
    """deit.model.Mlp on `deit.kernels.gelu_mlp`."""


class FusedBlock(blocks.FusedBlock, model.Block):
    """deit.model.Block with its residual additions in the products' epilogues."""

    DROP_PATHS = ("drop_path",)
    SCALE_KINDS = (nn.Identity, model.LayerScale)
    DROP_PATH_KINDS = (model.DropPath,)
    STANDS_FOR = (*SCALE_KINDS, *DROP_PATH_KINDS)

    def keep(self, index: int, x: Tensor) -> Tensor | None:
        return self.drop_path.keep(x)


class FusedDeiT(ImageEmbedding, PrefixOnly, model.DeiT):
    """deit.model.DeiT embedded by one operator, its last block for the prefix tokens alone."""

    STEPS = ("forward_features", "embed", "prefix")
    STANDS_FOR = (nn.Sequential, model.PatchEmbed, nn.Conv2d)

    def rows(self) -> int:
        return self.config.prefix_tokens

    def prefix_tokens(self) -> Tensor:
        return self.prefix()

    def by_steps(self, images: Tensor) -> Tensor:
        return self.embed(images)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.runs_fused(images):
            return super().forward(images)
        self._check(images)
        return self.forward_head(self.prefix_features(self.embedded(images)))


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {
    nn.LayerNorm: FusedLayerNorm,
    nn.RMSNorm: FusedRMSNorm,
    model.Attention: FusedAttention,
    model.Mlp: FusedMlp,
}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {model.Block: FusedBlock}
ROOTS: dict[type[nn.Module], type[modules.Fused]] = {model.DeiT: FusedDeiT}
