"""The fused class for the MLP of timm's ViTamin; imported only where timm is in use already."""

from __future__ import annotations

from timm.models import vitamin
from torch import nn

from deit.fused_vit import feed_forward, modules
from deit.fused_vit import timm as timm_models


class FusedGeGluMlp(feed_forward.FusedGatedMlp, vitamin.GeGluMlp):
    """timm's GeGluMlp, which normalises its input itself, on `deit.kernels.glu_mlp`."""

    LINEARS = ("w0", "w1", "w2")
    DROPOUTS = ("drop1", "drop2")
    ACTIVATION = "act"
    ACTIVATIONS = timm_models.ACTIVATIONS
    FIRST = "norm"


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {vitamin.GeGluMlp: FusedGeGluMlp}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
