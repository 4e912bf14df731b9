"""fuse() on Hugging Face's DINOv3ViT."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import transformers
from fusing import filled, forbid_originals

from deit.fused_vit import fuse, unfuse
from deit.fused_vit.modules import Fused

IMAGES = torch.randn(3, 3, 48, 64, generator=torch.Generator().manual_seed(1))
KINDS = {
    "plain": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "biases": {"key_bias": True},
}


def make(kind="plain", attn="sdpa", **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
             "num_register_tokens": 3}  # fmt: skip
    config = transformers.DINOv3ViTConfig(
        **sizes, **KINDS[kind], **options, attn_implementation=attn
    )
    return filled(transformers.DINOv3ViTModel(config))


@torch.no_grad()
def outputs(model, images=IMAGES, **options):
    found = model(images, output_hidden_states=True, **options)
    return [found.last_hidden_state, found.pooler_output, *found.hidden_states,
            *(found.attentions or ())]  # fmt: skip


def same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        close = 1e-12 if ours.dtype == torch.float64 else 5e-6
        torch.testing.assert_close(ours, theirs, rtol=0, atol=close * theirs.abs().max().item())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_outputs_by_the_fused_layers(kind, attn, monkeypatch):
    model = make(kind, attn)
    keys = list(model.state_dict())
    wanted = outputs(model), outputs(model.double(), IMAGES.double())
    report = fuse(model.float())
    assert {"model.layer.0", "model.layer.1"} <= set(report.fused)
    assert not any(name.startswith("model.layer") for name in report.left)
    forbid_originals(monkeypatch)
    same(outputs(model), wanted[0])
    same(outputs(model.double(), IMAGES.double()), wanted[1])
    assert list(unfuse(model).state_dict()) == keys
    assert not any(isinstance(module, Fused) for module in model.modules())


def test_recorded_attentions_are_as_before():
    model = make(attn="eager")
    want = outputs(model, output_attentions=True)
    assert len(want) == 7
    fuse(model)
    same(outputs(model, output_attentions=True), want)


def test_a_training_step_with_stochastic_depth_and_moved_coordinates():
    moved = {"pos_embed_rescale": 2.0, "pos_embed_shift": 0.1}
    model = make("gated", drop_path_rate=0.3, **moved).train()

    def step(network):
        torch.manual_seed(1)
        loss = network(IMAGES).last_hidden_state.square().sum()
        return [loss, *torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)]

    want, twin = step(model), copy.deepcopy(model)
    fuse(twin)
    for got, expected in zip(step(twin), want, strict=True):
        if expected is not None:
            torch.testing.assert_close(
                got, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item()
            )


def test_attention_by_itself_gives_its_weights():
    model = make(attn="eager")
    attention = model.model.layer[0].attention
    x, tables = torch.randn(1, 52, 64), model.rope_embeddings(IMAGES[:1])
    with torch.no_grad():
        want = attention(x, position_embeddings=tables)
        fuse(model)
        got = attention(x, position_embeddings=tables)
    same(got, want)


def test_dropout_runs_the_original():
    model = make(attention_dropout=0.4).train()
    twin = copy.deepcopy(model)
    fuse(twin)
    found = []
    for network in (model, twin):
        torch.manual_seed(3)
        found.append(outputs(network))
    same(found[1], found[0])


def test_as_a_backbone_and_in_bfloat16():
    config = make().config
    config.out_features = ["stage1", "stage2"]
    backbone = filled(transformers.DINOv3ViTBackbone(config))
    with torch.no_grad():
        want = backbone(IMAGES).feature_maps
        fuse(backbone)
        same(backbone(IMAGES).feature_maps, want)
        backbone.bfloat16()
        (*_, found) = backbone(IMAGES.bfloat16()).feature_maps
    assert (found.float() - want[-1]).norm() < 0.03 * want[-1].norm()
