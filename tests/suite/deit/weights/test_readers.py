"""Weights' files: those that are read, and those that are damaged or meant ill."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from small import IMAGES, hugging_face, logits, network, same, state_of

from deit.weights.checkpoint import load, load_into, save


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


# ---- small files that ask for gigabytes, or for ever


def spread(state):
    """One number with strides of 0: 8 GB once it is copied."""
    state["head.weight"] = torch.zeros(1, 1).expand(10_000_000, 192)
    state["head.bias"] = torch.zeros(1).expand(10_000_000)


def spread_elsewhere(state):
    state["extra"] = torch.zeros(1).expand(2_000_000_000)


def shared(state):
    """A thousand views of the same 4 MB."""
    state |= dict.fromkeys((f"extra.{n}" for n in range(1000)), torch.zeros(1_000_000))


@pytest.mark.parametrize("spoil", [spread, spread_elsewhere, shared])
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_more_bytes_than_there_are(tmp_path, spoil, legacy):
    state, path = state_of(), tmp_path / "small.pth"
    spoil(state)
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    for source in (path, state):
        with pytest.raises(ValueError, match=r"expected tensors of about the .* bytes that are"):
            load(source, num_heads=3)


def test_a_small_tensor_may_be_spread_and_weights_may_be_tied(tmp_path):
    state = state_of()
    state["head.bias"] = torch.ones(1).expand(7)
    state["blocks.1.norm1.weight"] = state["blocks.0.norm1.weight"]
    torch.save(state, tmp_path / "tied.pth")
    assert same(load(tmp_path / "tied.pth", num_heads=3).state_dict(), state)


def test_pytorchs_format_before_archives(tmp_path):
    torch.save(state_of(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "old.pth", num_heads=3).state_dict(), state_of())


@pytest.mark.parametrize(
    ("packing", "size", "message"),
    [
        (zipfile.ZIP_DEFLATED, 100_000_000, "are compressed"),
        (zipfile.ZIP_STORED, 16, "tensors of more numbers than the file keeps for them"),
    ],
)
def test_an_archive_that_is_not_what_it_says(tmp_path, packing, size, message):
    torch.save(state_of(), tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "odd.pth", "w", packing) as odd,
    ):
        for name in good.namelist():
            odd.writestr(name, bytes(size) if name.endswith("data/0") else good.read(name))
    with pytest.raises(ValueError, match=rf"odd\.pth: damaged.*{message}"):
        load(tmp_path / "odd.pth", num_heads=3)


class Memory:
    """Unpickling it takes gigabytes, by a call that torch's restricted unpickler makes."""

    def __reduce__(self):
        return bytearray, (3_000_000_000,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_asks_for_memory(tmp_path, legacy):
    path = tmp_path / "memory.pth"
    payload = {"model": state_of(), "more": Memory()}
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"memory\.pth: .*its pickle asks for a bytearray"):
        load(path, num_heads=3)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "config.json"])
def test_a_fifo_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    source = tmp_path / name
    if name == "config.json":
        save_file(state_of(), tmp_path / "model.safetensors")
        source = tmp_path
    with pytest.raises(ValueError, match=rf"{name}: expected a regular file; got a FIFO"):
        load(source)


def tensor(shape, offsets, dtype="F32"):
    return {"norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "longer than the file": (b"{}", 2**63),
    "of a gigabyte": (b"{}", 10**9),
    "none": (b"", 0),
    "deep": (b'{"a":' + b"[" * 10**6, None),
    "beyond the end": (tensor([2], [0, 8]), None),
    "backwards": (tensor([1], [4, 0]), None),
    "before the start": (tensor([1], [-4, 0]), None),
    "too many numbers": (tensor([2**40, 2**40], [0, 4]), None),
    "no numbers, and too many": (tensor([2**63, 0], [0, 0]), None),
    "of no type": (tensor([1], [0, 4], "F99"), None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_cannot_be(tmp_path, name):
    header, length = HEADERS[name]
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    with pytest.raises(ValueError, match=r"odd\.safetensors: damaged or not a safetensors file"):
        load(path)


def test_tensors_without_numbers(tmp_path):
    """Their shapes may be of any size, and a width is taken from them."""
    state = state_of() | {"patch_embed.proj.weight": torch.zeros(2**40, 3, 0, 0)}
    save_file(state, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight: expected 4 dimensions; got"):
        load(tmp_path / "empty.safetensors", num_heads=3)


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"model_type": "vit", "layer_norm_eps": NaN}']
)
def test_a_config_that_is_no_json(tmp_path, text):
    save_file(
        hugging_face("ViTForImageClassification").state_dict(), tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(text)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=r"config\.json: .*expected"):
            load(source)


def test_metadata_that_is_no_config(tmp_path):
    path = tmp_path / "odd.safetensors"
    good = '"name": "x", "embed_dim": 192, "num_heads": '
    wrong = ("5", '"3"', "true", "3.0", '3, "depth": 1e9', '3, "depth": 1000000', '3, "eps": NaN')
    wrong += ('3, "patch_size": 0', '3, "img_size": 1048576', '3, "surprise": 1')
    for text in ("{", "[1]", "[" * 100_000, "{}", *(f"{{{good}{each}}}" for each in wrong)):
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


@pytest.mark.parametrize(
    "part", ["../elsewhere.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\0b"]
)
def test_a_shard_outside_its_folder_is_refused(tmp_path, part):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    index = {"weight_map": {"a": part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a weight_map to files in the same folder"):
        load(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json: .*expected .*; got"):
        load(tmp_path)
