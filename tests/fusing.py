"""Small models of every family that fuse() knows, and what tests of fused models share."""

import pytest
import timm
import torch
import transformers
from torchvision.models import vision_transformer

import deit
from deit.fused_vit.modules import Fused

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def ours(dim=64, heads=2):
    return deit.DeiT(
        deit.Config(
            "small",
            embed_dim=dim,
            num_heads=heads,
            depth=2,
            img_size=32,
            patch_size=8,
            num_classes=10,
            mlp_ratio=2,
        )
    )


def timms(dim=64, heads=2, **options):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=dim,
        depth=2,
        num_heads=heads,
        num_classes=10,
        mlp_ratio=2,
        **options,
    )


def torchvisions(dim=64, heads=2):
    return vision_transformer.VisionTransformer(32, 8, 2, heads, dim, 2 * dim, num_classes=10)


def hugging_face(dim=64, heads=2, **options):
    config = transformers.ViTConfig(
        hidden_size=dim,
        num_attention_heads=heads,
        num_hidden_layers=2,
        intermediate_size=2 * dim,
        image_size=32,
        patch_size=8,
        num_labels=10,
        **options,
    )
    return transformers.ViTForImageClassification(config)


FAMILIES = {
    "ours": ours,
    "timm": timms,
    "torchvision": torchvisions,
    "hugging face": hugging_face,
}
BLOCKS = {
    "ours": "blocks",
    "timm": "blocks",
    "torchvision": "encoder.layers",
    "hugging face": "vit.layers",
}


def make(family, **options):
    """A small model, no parameter at its initial zero or one, in evaluation mode."""
    torch.manual_seed(0)
    return filled(FAMILIES[family](**options))


def filled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def blocks(model, family):
    return list(model.get_submodule(BLOCKS[family]))


def logits(model, images=IMAGES):
    """What the model gives, with no gradient."""
    with torch.no_grad():
        out = model(images)
    return getattr(out, "logits", out)


def same(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def forbid_originals(monkeypatch):
    """From now on a fused module that runs its original forward fails the test."""
    runs_fused = Fused.runs_fused

    def asked(self, x):
        return runs_fused(self, x) or pytest.fail(f"{type(self).__name__} ran unfused")

    monkeypatch.setattr(Fused, "runs_fused", asked)
