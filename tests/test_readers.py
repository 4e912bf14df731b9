"""Weights' files: those that are read, and those that are damaged or meant ill."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from small import IMAGES, hugging_face, logits, network, same, state_of

from deit.checkpoint import load, load_into, save


def test_official_file(tmp_path):
    state = state_of()
    torch.save({"model": state}, tmp_path / "weights.pth")
    assert same(load(tmp_path / "weights.pth", num_heads=3).state_dict(), state)


def test_training_checkpoint_with_namespace_and_entries(tmp_path):
    state, averaged = state_of(seed=0), state_of(seed=1)
    path = tmp_path / "checkpoint.pth"
    optimizer = torch.optim.AdamW(network().parameters())
    checkpoint = {
        "model": state,
        "model_ema": averaged,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"t": 1},
        "scaler": {"scale": 2.0},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3, data="imagenet"),
    }
    torch.save(checkpoint, path)
    assert same(load(path, num_heads=3).state_dict(), state)
    assert same(load(path, entry="model_ema", num_heads=3).state_dict(), averaged)
    with pytest.raises(ValueError, match=r"checkpoint\.pth.*no entry 'teacher'.*model_ema"):
        load(path, entry="teacher")
    with pytest.raises(ValueError, match=r"entry 'optimizer' is no state dict"):
        load(path, entry="optimizer")


def test_hugging_face_sharded_folder(tmp_path):
    model = hugging_face("ViTForImageClassification")
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (logits(load(tmp_path), IMAGES) - logits(model, IMAGES)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("qkv_bias", False),
        ("num_attention_heads", 5),
        ("num_attention_heads", 0),
        ("patch_size", 8),
        ("patch_size", 0),
        ("patch_size", [16, 8]),
        ("image_size", [128, 32]),
        ("hidden_size", "192"),
        ("hidden_size", True),
        ("intermediate_size", 800),
        ("head_dim", 32),
        ("layer_norm_eps", -1.0),
        ("layer_norm_eps", None),
        ("layer_norm_eps", "1e-12"),
        ("layer_norm_eps", 1e300),
        ("model_type", "beit"),
        ("model_type", ["vit"]),
    ],
)
def test_hugging_face_config_that_is_not_our_network(tmp_path, key, value):
    hugging_face("ViTForImageClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key}: expected .*; got"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [(3, "expected a path or a state dict; got int"), (network(), r"got DeiT \(pass its state_di")],
    ids=["int", "module"],
)
def test_other_kinds_of_source(source, message):
    with pytest.raises(TypeError, match=message):
        load(source)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "beside weights"])
def test_a_pickle_bomb_does_not_go_off(tmp_path, write, inside):
    path, proof = tmp_path / "bomb.pth", tmp_path / "exploded"
    bomb = Bomb(proof)
    write({"model": state_of(), "args": bomb} if inside else bomb, path)
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"bomb\.pth: (refused|damaged)") as caught:
        load_into(model, path)
    assert not proof.exists()
    assert same(model.state_dict(), before)
    assert "weights_only" not in str(caught.value)
    if write is torch.save:
        assert "asks for posix.system" in str(caught.value)
        torch.load(path, weights_only=False)  # the bomb is a live one
        assert proof.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"module\.pth: refused.*torch\.nn\.modules\.linear\.Lin"):
        load(tmp_path / "module.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_named(tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": state_of()}, path)
    else:
        save(network(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"weights{suffix}: damaged or not a "):
        load(path)


def test_metadata_that_is_no_config(tmp_path):
    path = tmp_path / "odd.safetensors"
    for text in ("{", "[1]", '{"name": "x", "embed_dim": 192, "num_heads": 5}'):
        save_file(state_of(), path, metadata={"deit.config": text})
        with pytest.raises(
            ValueError, match=r"odd\.safetensors: its metadata 'deit\.config' is no"
        ):
            load(path)


def test_files_that_are_not_there_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such weights file: .*nothing is downloaded"):
        load(tmp_path / "absent.pth")
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a file name ending in \.safetensors, \.pth"):
        load(tmp_path / "weights.onnx")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load(tmp_path)


def test_a_shard_outside_its_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a weight_map to files in the same folder"):
        load(tmp_path)
