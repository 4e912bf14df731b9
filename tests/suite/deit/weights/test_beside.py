"""What lies beside weights: the number of heads, classes and statistics, and what is asked for."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from small import IMAGES, SMALL, hugging_face, logits, network, state_of

from deit.configs import config
from deit.training.runs import RunFolder, State
from deit.weights import layouts, networks
from deit.weights.checkpoint import load, load_into, save

OTHER = replace(SMALL, num_heads=6, eps=1e-4)
ABOUT = {
    "network": {"arch": "deit_ti", "img_size": 64},
    "classes": list("abcdefg"),
    "mean": [0.1, 0.2, 0.3],
    "std": [0.5, 0.6, 0.7],
    "options": {
        "distilled": False,
        "weights": None,
        "shape": {"embed_dim": None, "depth": 2, "num_heads": 6, "patch_size": None},
        "recipe": {"eval_crop": 1.0, "layer_scale": None},
    },
}


def run_of(folder, about, state):
    """A run that was stopped after its first checkpoint, whose path is returned."""
    run = RunFolder(folder)
    run.begin(about)
    return run.save(State(100, dict(state), dict(state), {}))


# ---- nothing says it


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,  # a published width, but two blocks of it
        replace(config("deit_ti", img_size=32), patch_size=4),
        replace(config("deit_ti"), mlp_ratio=2),
        replace(config("deit_ti"), embed_dim=96, num_heads=3, depth=6),
    ],
    ids=["depth", "patches", "mlp", "width"],
)
def test_a_shape_that_was_never_published_asks_for_its_heads(settings):
    state = state_of(settings)
    with pytest.raises(ValueError, match=r"num_heads: expected a number, or a deit.Config"):
        load(state)
    heads = settings.embed_dim // 16
    assert load(state, num_heads=heads).config.num_heads == heads
    with pytest.raises(ValueError, match=r"num_heads: expected a divisor of embed_dim"):
        load(state, num_heads=5)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_patch16_224", 3),
        ("deit3_medium_patch16_224", 8),
        ("vit_small_patch32_224", 6),
        ("vit_base_patch8_224", 12),
        ("vit_large_patch16_224", 16),
        ("vit_huge_patch14_224", 16),
    ],
)
def test_published_networks_load_unasked(name, heads):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=3)
    assert theirs.blocks[0].attn.num_heads == heads
    state = {key: torch.zeros(1).expand(v.shape) for key, v in theirs.state_dict().items()}
    own, known = layouts.infer(layouts.convert(state))
    assert (own.num_heads, known) == (heads, True)


# ---- something says it


def test_what_is_said_is_not_overruled(tmp_path):
    path = tmp_path / "six.safetensors"
    save(network(OTHER), path)
    assert load(path).config == OTHER
    for how in ({"num_heads": 3}, {"arch": SMALL}):
        with pytest.raises(ValueError, match=r"num_heads: the weights have 6.*asked for has 3"):
            load(path, **how)
    with pytest.raises(ValueError, match=r"num_heads: the weights have 6"):
        load_into(network(SMALL), path)


@pytest.mark.parametrize("file", ["", "model.safetensors", "average.safetensors"])
@pytest.mark.parametrize("kept", ["options", "config"])
def test_a_runs_checkpoint_is_the_runs_network(tmp_path, kept, file):
    settings = OTHER if kept == "config" else replace(OTHER, eps=1e-6)
    about = json.loads(json.dumps(ABOUT))
    if kept == "config":  # as `deit train` writes it now; older runs have their options alone
        about["network"]["config"] = asdict(OTHER)
    model = network(settings)
    found = run_of(tmp_path, about, model.state_dict()) / file
    assert load(found).config == replace(settings, name=load(found).config.name)
    again, said = networks.opened(found)
    assert torch.equal(logits(again, IMAGES), logits(model, IMAGES))
    assert (said["classes"], said["mean"], networks.crop_of(said)) == (
        list("abcdefg"), [0.1, 0.2, 0.3], 1.0
    )  # fmt: skip


def test_an_older_run_that_began_with_weights_does_not_say_its_heads(tmp_path):
    about = {**ABOUT, "options": {**ABOUT["options"], "weights": "other.pth"}}
    path = run_of(tmp_path, about, state_of(OTHER)) / "model.safetensors"
    with pytest.raises(ValueError, match="num_heads: expected a number"):
        load(path)
    assert load(path, num_heads=6).config.num_heads == 6


@pytest.mark.parametrize("file", ["", "model.safetensors"])
@pytest.mark.parametrize("heads", [2, 6])
def test_hugging_faces_config_beside_the_weights(tmp_path, heads, file):
    labels = dict(enumerate("abcdefg"))
    theirs = hugging_face(
        "ViTForImageClassification",
        num_attention_heads=heads, intermediate_size=384, layer_norm_eps=1e-3, id2label=labels,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours, about = networks.opened(tmp_path / file)
    assert (ours.config.num_heads, ours.config.eps, ours.config.mlp_ratio) == (heads, 1e-3, 2)
    assert (logits(ours, IMAGES) - logits(theirs, IMAGES)).abs().max() < 2e-5
    assert about == {"classes": list("abcdefg")}
    prepared = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.4] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    about = networks.opened(tmp_path / file)[1]
    assert (about["mean"], about["std"]) == ([0.5] * 3, [0.4] * 3)
    assert networks.crop_of(about) is None


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_timms_config_beside_the_weights(tmp_path, file):
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7, num_heads=6
    ).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    trained = {"mean": [0.5] * 3, "std": [0.4] * 3}
    said = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": trained}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="num_heads: expected a number"):
        load(tmp_path / file)
    said["model_args"] = {"num_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, about = networks.opened(tmp_path / file)
    assert (logits(ours, IMAGES) - logits(theirs, IMAGES)).abs().max() < 1e-5
    assert about == trained


def test_a_config_of_something_else_is_no_neighbour_of_a_file(tmp_path):
    save_file(state_of(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert load(tmp_path / "model.safetensors", num_heads=3).config == SMALL
    with pytest.raises(ValueError, match=r"config\.json: model_type: expected 'deit' or 'vit'"):
        load(tmp_path, num_heads=3)


# ---- what is said cannot be so


ODD = {
    "network": ({}, [], None, {"arch": 3, "img_size": 64}, {"arch": "deit_ti", "img_size": 1e6}),
    "classes": ([], {}, ["a", 3], ["a"] * 6, "abcdefg"),
    "mean": ([0.5], [0.1, 0.2, "0.3"], [1e300] * 3, None),
    "std": ([0.5, 0.5, 0], [-1, 1, 1]),
    "options": (
        None,
        {},
        {"recipe": {"eval_crop": "big"}},
        {"recipe": {"eval_crop": 0}},
        {"recipe": {}, "shape": {"depth": 10**15, "num_heads": 6}},
        {"recipe": {}, "shape": {"depth": 2, "num_heads": 6, "embed_dim": 2**50}},
        {"recipe": {}, "shape": {"depth": 2, "num_heads": 6, "surprise": 1}},
        {"recipe": {}, "shape": {"depth": 3, "num_heads": 6}},
        {"recipe": {}, "shape": {"depth": 2}, "distilled": "no"},
    ),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in ODD.items() for v in values])
def test_an_absurd_run_file_names_its_field(tmp_path, field, value):
    path = run_of(tmp_path, {**ABOUT, field: value}, state_of(OTHER))
    with pytest.raises(ValueError, match=r"(run\.json: .*expected|names of 7 classes).*; got"):
        networks.opened(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_a_run_file_that_is_no_json(tmp_path, text):
    path = run_of(tmp_path, ABOUT, state_of(OTHER))
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: .*expected .*; got"):
        networks.opened(path)


def test_a_timm_runs_classes_are_those_of_its_weights(tmp_path):
    """It is refused before the network is made: a run.json of megabytes can name millions."""
    model = timm.create_model("resnet10t", num_classes=3)
    about = {**ABOUT, "network": {"arch": "timm:resnet10t", "img_size": 64}}
    path = run_of(tmp_path, {**about, "classes": ["a"] * 100_000}, model.state_dict())
    with pytest.raises(ValueError, match=r"run\.json: classes: expected as many as .* 100000"):
        networks.opened(path)
