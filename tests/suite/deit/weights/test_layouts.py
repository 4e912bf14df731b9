"""Whose key names a state dict uses: every layout, and what each becomes."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small import IMAGES, SMALL, SMALL_DISTILLED, hugging_face, logits, same, state_of
from timm.models.vision_transformer import checkpoint_filter_fn

import deit
from deit.fused_vit import fuse
from deit.weights.checkpoint import load


@pytest.mark.parametrize("settings", [SMALL, SMALL_DISTILLED], ids=["plain", "distilled"])
def test_a_state_dict_says_what_network_it_is_of(settings):
    state = state_of(settings)
    model = load(state, num_heads=3)
    assert model.config == settings
    assert same(model.state_dict(), state)
    assert not model.training


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("deit_tiny_distilled_patch16_224", "deit_ti_distilled"),
        ("deit_small_patch16_224", "deit_s"),
        ("deit_base_patch16_384", "deit_b_384"),
        ("vit_large_patch16_224", "vit_l"),
    ],
)
def test_variants_are_inferred_from_shapes(name, arch):
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    assert load(state).config == deit.config(arch)


def test_timm_files(tmp_path):
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=64, depth=2, num_classes=7
    ).eval()
    torch.save(model.state_dict(), tmp_path / "timm.bin")
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    for name in ("timm.bin", "timm.safetensors"):
        ours = load(tmp_path / name, test_head="logit-mean", num_heads=3)
        assert (logits(ours, IMAGES) - logits(model, IMAGES)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "kind",
    [
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
    ],
)
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_hugging_face_folder(tmp_path, kind, eps):
    model = hugging_face(kind, layer_norm_eps=eps)
    model.save_pretrained(tmp_path)
    assert any(".encoder.layer.0." in key for key in load_file(tmp_path / "model.safetensors"))
    head = "class" if kind == "DeiTForImageClassification" else "logit-mean"
    ours = load(tmp_path, test_head=head)
    assert ours.config.eps == eps
    assert (logits(ours, IMAGES) - logits(model, IMAGES)).abs().max() < 2e-5


def deit3(img_size=64):
    torch.manual_seed(0)
    model = timm.create_model("deit3_small_patch16_224", img_size=img_size, depth=2, num_classes=7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def officially(state):
    """timm's names of DeiT III as the official files have them."""
    return {re.sub(r"ls([12])\.gamma", r"gamma_\1", key): value for key, value in state.items()}


@pytest.mark.parametrize("names", [dict, officially])
def test_deit3_has_layer_scale_and_no_position_for_its_class_token(names):
    theirs = deit3()
    assert theirs.pos_embed.shape == (1, 16, 384)
    state = names(theirs.state_dict())
    ours = load(state, num_heads=6)
    assert ours.config.layer_scale == 1e-4
    assert torch.equal(ours.pos_embed[:, :1], torch.zeros(1, 1, 384))
    assert torch.equal(ours.blocks[1].ls2.gamma, theirs.blocks[1].ls2.gamma)
    assert (logits(ours, IMAGES) - logits(theirs, IMAGES)).abs().max() < 1e-5
    fuse(ours)
    assert (logits(ours, IMAGES) - logits(theirs, IMAGES)).abs().max() < 2e-5


def test_deit3_is_resized_as_timm_does():
    state = deit3().state_dict()
    theirs = deit3(img_size=128)
    theirs.load_state_dict(checkpoint_filter_fn(state, theirs))
    images = torch.nn.functional.interpolate(IMAGES, size=(128, 128))
    ours = load(state, img_size=128, num_heads=6)
    assert (logits(ours, images) - logits(theirs, images)).abs().max() < 2e-5


def test_layer_scale_of_half_a_network_is_refused():
    state = deit3().state_dict()
    del state["blocks.1.ls1.gamma"]
    with pytest.raises(ValueError, match=r"1 missing: blocks.1.ls1.gamma"):
        load(state, num_heads=6)
    state["blocks.0.gamma_2"] = state["blocks.0.ls2.gamma"]
    with pytest.raises(ValueError, match=r"ls2.gamma and blocks.0.gamma_2 are the same tensor"):
        load(state, num_heads=6)


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_hugging_face_state_dict_runs_with_its_epsilon(kind):
    state = hugging_face(kind).state_dict()
    assert any(".layers.0.attention.q_proj." in key for key in state)
    assert load(state, test_head="class", num_heads=3).config.eps == 1e-12
    assert load(state, test_head="class", eps=1e-6, num_heads=3).config.eps == 1e-6


def test_hugging_face_bare_model_takes_a_fresh_head():
    state = hugging_face("ViTModel").state_dict()
    assert "embeddings.cls_token" in state
    with pytest.raises(ValueError, match=r"no weights of head \(reset_head=True.*2 unexp.*pooler"):
        load(state, num_heads=3)
    model = load(state, reset_head=True, num_heads=3, num_classes=5, ignore=["pooler."])
    assert torch.equal(model.cls_token, state["embeddings.cls_token"])
    assert model.head.weight.shape == (5, 192)


def test_hugging_face_class_head_alone_needs_the_class_test_head():
    state = hugging_face("DeiTForImageClassification").state_dict()
    with pytest.raises(ValueError, match=r"no weights of head_dist.*test_head='class'"):
        load(state, num_heads=3)


def test_torchvision_with_both_names_of_its_mlp():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(64, 16, 2, 3, 192, 768, num_classes=7).eval()
    torch.nn.init.normal_(model.heads.head.weight, std=0.2)
    state = model.state_dict()
    published = {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
        for key, value in state.items()
    }
    assert published.keys() != state.keys()
    for source in (state, published):
        assert (
            logits(load(source, num_heads=3), IMAGES) - logits(model, IMAGES)
        ).abs().max() < 1e-5


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrappers_are_stripped(wrapper):
    state = state_of()
    wrapped = {wrapper + key: value for key, value in state.items()}
    assert same(load(wrapped, num_heads=3).state_dict(), state)


def test_prefix_chooses_one_network_of_several():
    state = state_of()
    both = {f"student.{k}": v for k, v in state.items()} | {"teacher.fc.weight": torch.ones(1)}
    assert same(load(both, prefix="student.", num_heads=3).state_dict(), state)
    with pytest.raises(ValueError, match=r"prefix: no key starts with 'pupil.'"):
        load(both, prefix="pupil.")


def test_one_projection_of_three_missing():
    state = hugging_face("ViTForImageClassification").state_dict()
    del state["vit.layers.1.attention.k_proj.weight"]
    with pytest.raises(ValueError, match=r"has only .*q_proj.weight, .*v_proj.weight of its query"):
        load(state, num_heads=3)


def test_two_keys_for_one_tensor():
    state = hugging_face("ViTForImageClassification").state_dict()
    state["cls_classifier.bias"] = state["classifier.bias"]
    with pytest.raises(ValueError, match=r"classifier.bias and cls_classifier.bias are the same"):
        load(state, num_heads=3)
