"""Loading weights: every layout, every refusal, and the network untouched after each refusal."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

import deit
from deit.checkpoint import load, load_into, resize_positions, save
from deit.model import DeiT

# Two blocks of DeiT-Ti at 64 px: every key there is, in 1 MB.
SMALL = replace(deit.config("deit_ti", img_size=64, num_classes=7), depth=2)
SMALL_DISTILLED = replace(SMALL, distilled=True)


def network(settings=SMALL, seed=0, **options):
    torch.manual_seed(seed)
    model = DeiT(settings, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def state_of(settings=SMALL, seed=0):
    return network(settings, seed).state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def hugging_face(kind, **changes):
    family = transformers.ViTConfig if kind.startswith("ViT") else transformers.DeiTConfig
    shape = {
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 64,
        "num_labels": 7,
    }
    torch.manual_seed(1)
    model = getattr(transformers, kind)(family(**{**shape, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model, images):
    with torch.inference_mode():
        found = model(images)
    return found if isinstance(found, torch.Tensor) else found.logits


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


# ---- sources


@pytest.mark.parametrize("settings", [SMALL, SMALL_DISTILLED], ids=["plain", "distilled"])
def test_a_state_dict_says_what_network_it_is_of(settings):
    state = state_of(settings)
    model = load(state)
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
        shapes = timm.create_model(name, depth=2).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    assert load(state).config == replace(deit.config(arch), depth=2)


def test_loaded_weights_are_copies():
    state = state_of()
    load(state).head.weight.data.zero_()
    assert state["head.weight"].abs().sum() > 0


def test_official_file(tmp_path):
    state = state_of()
    torch.save({"model": state}, tmp_path / "weights.pth")
    assert same(load(tmp_path / "weights.pth").state_dict(), state)


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
    assert same(load(path).state_dict(), state)
    assert same(load(path, entry="model_ema").state_dict(), averaged)
    with pytest.raises(ValueError, match=r"checkpoint\.pth.*no entry 'teacher'.*model_ema"):
        load(path, entry="teacher")
    with pytest.raises(ValueError, match=r"entry 'optimizer' is no state dict"):
        load(path, entry="optimizer")


def test_timm_files(tmp_path):
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=64, depth=2, num_classes=7
    ).eval()
    torch.save(model.state_dict(), tmp_path / "timm.bin")
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    for name in ("timm.bin", "timm.safetensors"):
        ours = load(tmp_path / name, test_head="logit-mean")
        assert (logits(ours, IMAGES) - logits(model, IMAGES)).abs().max() < 1e-6


def test_our_file_round_trip(tmp_path):
    settings = replace(SMALL_DISTILLED, eps=1e-5, name="mine")
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


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_hugging_face_state_dict_runs_with_its_epsilon(kind):
    state = hugging_face(kind).state_dict()
    assert any(".layers.0.attention.q_proj." in key for key in state)
    assert load(state, test_head="class").config.eps == 1e-12
    assert load(state, test_head="class", eps=1e-6).config.eps == 1e-6


def test_hugging_face_sharded_folder(tmp_path):
    model = hugging_face("ViTForImageClassification")
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (logits(load(tmp_path), IMAGES) - logits(model, IMAGES)).abs().max() < 2e-5


def test_hugging_face_bare_model_takes_a_fresh_head():
    state = hugging_face("ViTModel").state_dict()
    assert "embeddings.cls_token" in state
    with pytest.raises(ValueError, match=r"no weights of head \(reset_head=True.*2 unexp.*pooler"):
        load(state)
    model = load(state, reset_head=True, num_classes=5, ignore=["pooler."])
    assert torch.equal(model.cls_token, state["embeddings.cls_token"])
    assert model.head.weight.shape == (5, 192)


def test_hugging_face_class_head_alone_needs_the_class_test_head():
    state = hugging_face("DeiTForImageClassification").state_dict()
    with pytest.raises(ValueError, match=r"no weights of head_dist.*test_head='class'"):
        load(state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("qkv_bias", False),
        ("num_attention_heads", 6),
        ("patch_size", 8),
    ],
)
def test_hugging_face_config_that_is_not_our_network(tmp_path, key, value):
    hugging_face("ViTForImageClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key}: expected .*; got"):
        load(tmp_path)


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
        assert (logits(load(source), IMAGES) - logits(model, IMAGES)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrappers_are_stripped(wrapper):
    state = state_of()
    wrapped = {wrapper + key: value for key, value in state.items()}
    assert same(load(wrapped).state_dict(), state)


def test_prefix_chooses_one_network_of_several():
    state = state_of()
    both = {f"student.{k}": v for k, v in state.items()} | {"teacher.fc.weight": torch.ones(1)}
    assert same(load(both, prefix="student.").state_dict(), state)
    with pytest.raises(ValueError, match=r"prefix: no key starts with 'pupil.'"):
        load(both, prefix="pupil.")


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
    model = load(state, img_size=96)
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
    with pytest.raises(ValueError, match=r"arch: the weights' 64 channels are of no variant"):
        load(state)


def test_heads_are_reset_only_when_asked():
    state = state_of(SMALL_DISTILLED)
    with pytest.raises(ValueError, match=r"head of 7 classes for 3 \(reset_head=True"):
        load(state, num_classes=3)
    model = load(state, num_classes=3, reset_head=True)
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
    model = load(state)
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
    "layer scale": (with_key("blocks.0.ls1.gamma", torch.ones(192)), "LayerScale.*not supported"),
    "deit iii": (with_key("blocks.0.gamma_1", torch.ones(192)), "LayerScale.*not supported yet"),
    "no class position": (
        with_key("pos_embed", torch.zeros(1, 16, 192)),
        "no position for the class token.*not supported yet",
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
        load(state_of(SMALL), distilled=True)


def test_weights_of_another_size_name_both_networks():
    with pytest.raises(ValueError, match=r"deit_ti.* do not fit deit_s \(12 blocks of 384"):
        load(state_of(), "deit_small_patch16_224")


def test_one_projection_of_three_missing():
    state = hugging_face("ViTForImageClassification").state_dict()
    del state["vit.layers.1.attention.k_proj.weight"]
    with pytest.raises(ValueError, match=r"has only .*q_proj.weight, .*v_proj.weight of its query"):
        load(state)


def test_two_keys_for_one_tensor():
    state = hugging_face("ViTForImageClassification").state_dict()
    state["cls_classifier.bias"] = state["classifier.bias"]
    with pytest.raises(ValueError, match=r"classifier.bias and cls_classifier.bias are the same"):
        load(state)


def test_values_too_large_for_the_networks_dtype():
    state = state_of()
    state["norm.weight"] = torch.full((192,), 1e6)
    with pytest.raises(ValueError, match=r"1 with NaN or infinity: norm.weight"):
        load_into(network().half(), state)


@pytest.mark.parametrize(
    ("source", "message"),
    [(3, "expected a path or a state dict; got int"), (network(), r"got DeiT \(pass its state_di")],
    ids=["int", "module"],
)
def test_other_kinds_of_source(source, message):
    with pytest.raises(TypeError, match=message):
        load(source)


def test_load_into_other_kinds_of_model():
    with pytest.raises(TypeError, match=r"model: expected a deit\.DeiT; got Linear"):
        load_into(torch.nn.Linear(1, 1), state_of())


# ---- files that are damaged, or meant ill


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
