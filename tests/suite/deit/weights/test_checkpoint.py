"""Loading and saving weights: every refusal, and the network untouched after each refusal."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL, SMALL_DISTILLED, network, same, state_of
from timm.layers import resample_abs_pos_embed

import deit
from deit.weights.checkpoint import load, load_into, resize_positions, save


def test_loaded_weights_are_copies():
    state = state_of()
    load(state, num_heads=3).head.weight.data.zero_()
    assert state["head.weight"].abs().sum() > 0


def test_our_file_round_trip(tmp_path):
    settings = replace(SMALL_DISTILLED, eps=1e-5, name="mine", layer_scale=0.25)
    model = network(settings)
    save(model, tmp_path / "ours.safetensors")
    again = load(tmp_path / "ours.safetensors")
    assert again.config == settings
    assert same(again.state_dict(), model.state_dict())
    assert os.listdir(tmp_path) == ["ours.safetensors"]
    assert same(load_file(tmp_path / "ours.safetensors"), model.state_dict())


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "ours.safetensors"
    save(network(seed=0), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(network(seed=1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["ours.safetensors"]


def test_saving_refuses_other_suffixes_and_models(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a name ending in \.safetensors"):
        save(network(), tmp_path / "ours.pth")
    with pytest.raises(TypeError, match=r"model: expected a deit\.DeiT; got Linear"):
        save(torch.nn.Linear(2, 2), tmp_path / "ours.safetensors")


# ---- sizes, heads and positions


@pytest.mark.parametrize("prefix_tokens", [1, 2])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (4, 7), (14, 14)])
def test_positions_are_resized_as_timm_does(old, new, prefix_tokens):
    positions = torch.randn(1, old * old + prefix_tokens, 32)
    ours = resize_positions(positions, new, prefix_tokens)
    theirs = resample_abs_pos_embed(positions, [new, new], num_prefix_tokens=prefix_tokens)
    assert torch.equal(ours[:, :prefix_tokens], positions[:, :prefix_tokens])
    assert (ours - theirs).abs().max() <= 1e-6


def test_half_precision_positions_are_resized_in_fp32():
    positions = torch.randn(1, 17, 32).half()
    exact = resize_positions(positions.double().float(), 6, 1)
    assert (resize_positions(positions, 6, 1).float() - exact).abs().max() < 2e-3


def test_another_image_size():
    state = state_of(SMALL_DISTILLED)
    model = load(state, img_size=96, num_heads=3)
    assert model.config.img_size == 96
    expected = resample_abs_pos_embed(state["pos_embed"], [6, 6], num_prefix_tokens=2)
    assert torch.allclose(model.pos_embed, expected, atol=1e-6)
    assert torch.equal(model.dist_token, state["dist_token"])


def test_arch_leaves_open_what_it_does_not_say():
    state = state_of(replace(deit.config("deit_ti", img_size=64, num_classes=7)))
    assert load(state, "deit_ti").config.img_size == 64
    assert load(state, "deit_ti").config.num_classes == 7
    assert load(state, "deit_tiny_patch16_224").config.img_size == 224


def test_a_config_is_taken_as_it_is():
    narrow = deit.Config("narrow", embed_dim=64, num_heads=2, depth=1, img_size=32, eps=1e-4)
    state = state_of(narrow)
    assert load(state, narrow).config == narrow
    with pytest.raises(ValueError, match=r"num_heads: expected a number.*1 blocks of 64 have"):
        load(state)


def test_heads_are_reset_only_when_asked():
    state = state_of(SMALL_DISTILLED)
    with pytest.raises(ValueError, match=r"head of 7 classes for 3 \(reset_head=True"):
        load(state, num_classes=3, num_heads=3)
    model = load(state, num_classes=3, num_heads=3, reset_head=True)
    for head in (model.head, model.head_dist):
        assert head.weight.shape == (3, 192)
        assert 0.01 < head.weight.std() < 0.03
        assert not head.bias.any()
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_non_square_positions_are_refused():
    state = state_of()
    state["pos_embed"] = torch.zeros(1, 1 + 12, 192)
    with pytest.raises(ValueError, match="pos_embed: expected a square grid"):
        load(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_converted(dtype):
    state = {key: value.to(dtype) for key, value in state_of().items()}
    model = load(state, num_heads=3)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert same(model.state_dict(), {key: value.float() for key, value in state.items()})


def test_load_into_keeps_dtype_mode_and_parameters():
    model = network(seed=5).to(torch.bfloat16).train()
    parameters = list(model.parameters())
    state = state_of()
    assert load_into(model, state) is model
    assert model.training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(model.state_dict(), {key: value.bfloat16() for key, value in state.items()})


def test_load_into_a_fused_network():
    from deit.fused_vit import fuse

    model = network(seed=5)
    fuse(model)
    state = state_of()
    load_into(model, state)
    assert same(model.state_dict(), state)


# ---- what is wrong is refused, and leaves the network alone


def without(key):
    return lambda state: state.pop(key)


def with_key(key, value):
    return lambda state: state.update({key: value})


NAN = torch.full((192,), float("nan"))

WRONG = {
    "missing": (without("blocks.1.mlp.fc2.bias"), "1 missing: blocks.1.mlp.fc2.bias"),
    "unexpected": (
        with_key("bn.num_batches_tracked2", torch.ones(1)),
        "1 unexpected: bn.num_batches_tracked2",
    ),
    "shape": (
        with_key("norm.weight", torch.ones(5)),
        r"1 of the wrong shape: norm.weight \[5\] for \[192\]",
    ),
    "no dimensions": (with_key("head.weight", torch.tensor(1.0)), "wrong shape: head.weight"),
    "integer": (
        with_key("norm.bias", torch.ones(192, dtype=torch.int64)),
        r"1 not floating point: norm.bias \(torch.int64\)",
    ),
    "counter": (
        with_key("num_batches_tracked", torch.tensor(3)),
        "not floating point: num_batches_tracked",
    ),
    "nan": (with_key("blocks.0.norm1.weight", NAN), "1 with NaN or infinity: blocks.0.norm1"),
    "meta": (with_key("norm.bias", torch.empty(192, device="meta")), "without values"),
    "sparse": (with_key("norm.bias", torch.ones(192).to_sparse()), "not dense"),
    "classes": (
        lambda state: state.update({"head.weight": torch.ones(9, 192), "head.bias": torch.ones(9)}),
        "head of 9 classes for 7",
    ),
    "no positions": (without("pos_embed"), "pos_embed: expected 3 dimensions; got none"),
    "layer scale": (
        with_key("blocks.0.gamma_1", torch.ones(192)),
        "1 unexpected: blocks.0.ls1.gamma",
    ),
    "resnet": (
        lambda state: (state.clear(), state.update({"conv1.weight": torch.ones(1)})),
        r"no DeiT or ViT by its keys \(conv1.weight\).*timm, Hugging Face, torchvision",
    ),
    "empty": (dict.clear, "no state dict of named tensors"),
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_weights_leave_the_network_untouched(how):
    spoil, message = WRONG[how]
    state = OrderedDict(state_of(seed=1))
    spoil(state)
    model = network(seed=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_into(model, state)
    assert same(model.state_dict(), before)


def test_everything_wrong_is_in_one_capped_message():
    state = {k: v for k, v in state_of().items() if not k.startswith("blocks.1.")}
    state |= {f"extra.{index}": torch.ones(1) for index in range(40)}
    state["norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match="state dict: timm weights of deit_ti") as caught:
        load_into(network(), state)
    message = str(caught.value)
    assert "12 missing: blocks.1.norm1.weight" in message
    assert "40 unexpected: extra.0" in message
    assert "and 34 more" in message
    assert "1 of the wrong shape: norm.weight" in message
    assert len(message) < 1500


def test_distilled_and_undistilled_do_not_mix():
    with pytest.raises(ValueError, match=r"weights have a distillation token.*is without one"):
        load_into(network(SMALL), state_of(SMALL_DISTILLED))
    with pytest.raises(ValueError, match=r"weights have no distillation token.*is with one"):
        load(state_of(SMALL), distilled=True, num_heads=3)


def test_weights_of_another_size_name_both_networks():
    with pytest.raises(ValueError, match=r"deit_ti.* do not fit deit_s \(12 blocks of 384"):
        load(state_of(), "deit_small_patch16_224")


def test_values_too_large_for_the_networks_dtype():
    state = state_of()
    state["norm.weight"] = torch.full((192,), 1e6)
    with pytest.raises(ValueError, match=r"1 with NaN or infinity: norm.weight"):
        load_into(network().half(), state)


def test_load_into_other_kinds_of_model():
    with pytest.raises(TypeError, match=r"model: expected a deit\.DeiT; got Linear"):
        load_into(torch.nn.Linear(1, 1), state_of())
