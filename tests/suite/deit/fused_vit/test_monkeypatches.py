"""A class whose methods somebody replaced runs as he wrote them, fused or not."""

import functools

import pytest
import timm
import torch
import transformers
from fusing import IMAGES, blocks, logits, make, same
from torch import nn
from torchvision.models import vision_transformer

from deit import model as ours
from deit.fused_vit import fuse, monkeypatches
from deit.fused_vit.modules import Fused

VIT = transformers.models.vit.modeling_vit
TIMM = timm.models.vision_transformer
PATCHED = {
    "ours": [ours.Attention, ours.Mlp, ours.Block, ours.DeiT, nn.LayerNorm, nn.Linear],
    "timm": [TIMM.Attention, TIMM.Block, TIMM.VisionTransformer, timm.layers.Mlp, nn.Linear],
    "torchvision": [
        vision_transformer.EncoderBlock,
        vision_transformer.MLPBlock,
        nn.MultiheadAttention,
        nn.LayerNorm,
    ],
    "hugging face": [VIT.ViTAttention, VIT.ViTMLP, VIT.ViTLayer, nn.LayerNorm, nn.Linear],
}
CASES = [(family, kind) for family, kinds in PATCHED.items() for kind in kinds]


def patch(monkeypatch, kind, name="forward"):
    """Replace the method as a tool does that looks at what passes by, and halve its result."""
    calls, original = [], getattr(kind, name)

    @functools.wraps(original)
    def noted(self, *args, **kwargs):
        calls.append(kind)
        out = original(self, *args, **kwargs)
        return 0.5 * out if isinstance(out, torch.Tensor) else (0.5 * out[0], *out[1:])

    monkeypatch.setattr(kind, name, noted)
    return calls


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("family", "kind"), CASES, ids=[f"{f}-{k.__name__}" for f, k in CASES])
def test_a_patched_forward_runs(family, kind, order, monkeypatch):
    model = make(family)
    plain = logits(model)
    if order == "after":
        fuse(model)
        same(logits(model), plain)
    calls = patch(monkeypatch, kind)
    want = logits(make(family))
    assert (want - plain).abs().max() > 1e-2
    expected = len(calls)
    calls.clear()
    report = fuse(model) if order == "before" else None
    same(logits(model), want)
    assert len(calls) == expected
    if report is None:
        report = fuse(model)
        same(logits(model), want)
    assert any(f"{kind.__name__}.forward was replaced" in note for note in report.left.values())
    monkeypatch.undo()
    same(logits(model), plain)
    fuse(model)
    assert all(isinstance(block, Fused) for block in blocks(model, family))
    same(logits(model), plain)


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [("ours", ours.DeiT, "embed"), ("timm", TIMM.VisionTransformer, "_pos_embed")],
)
def test_a_patched_step_of_a_root_runs(family, kind, name, monkeypatch):
    model = make(family)
    fuse(model)
    calls = patch(monkeypatch, kind, name)
    want = logits(make(family))
    calls.clear()
    same(logits(model), want)
    assert calls


def test_a_class_in_a_librarys_place_is_not_the_librarys(monkeypatch):
    class Attention(ours.Attention):
        def forward(self, x):
            return 2 * super().forward(x)

    assert monkeypatches.Methods([ours.Attention]).replaced() is None
    assert "not as its library" in monkeypatches.Methods([Attention]).replaced()
    monkeypatch.setattr(ours.Attention, "forward", ours.Mlp.forward)  # the library's, elsewhere
    assert "Attention.forward was replaced" in monkeypatches.Methods([ours.Attention]).replaced()


def test_compiled_it_runs_as_patched(monkeypatch):
    model = make("ours")
    fuse(model)
    patch(monkeypatch, ours.Mlp)
    want = logits(make("ours"))
    same(logits(torch.compile(model, backend="eager")), want)


def test_a_hook_on_timms_patch_norm_is_called():
    model = make("timm")
    fuse(model)
    calls = []
    model.patch_embed.norm.register_forward_hook(lambda *_: calls.append(1))
    logits(model, IMAGES)
    assert calls == [1]
