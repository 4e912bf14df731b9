"""fuse() on Hugging Face's DeiT and ViT."""

import importlib.util

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.0")

from transformers.models.deit import modeling_deit

import transformers  # isort: skip  (importing the models has put another module in its place)

from fusing import forbid_originals
from hf import IMAGES, KINDS, close, layers, make, step

from deit.fused_vit import fuse, huggingface, unfuse
from deit.fused_vit.modules import Fused, original_class


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_outputs_by_the_fused_layers(kind, attn, monkeypatch):
    model = make(kind, attn)
    want = model(IMAGES)
    report = fuse(model)
    assert sum(name.endswith(("layers.0", "layers.1")) for name in report.fused) == 2
    assert not any("_proj" in name for name in report.left)
    forbid_originals(monkeypatch)
    close(model(IMAGES), want)
    close(model(IMAGES, return_dict=False), want.to_tuple())


@torch.no_grad()
def test_eps_is_the_layer_s_own():
    model = make()
    assert layers(model)[0].layernorm_before.eps == 1e-12
    with torch.no_grad():
        layers(model)[0].layernorm_before.eps = 0.5
    want = model(IMAGES)
    fuse(model)
    close(model(IMAGES), want)


@torch.no_grad()
def test_recorded_outputs_are_as_before(monkeypatch):
    model = make(attn="eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    states, both = model(IMAGES, output_hidden_states=True), model(IMAGES, **wanted)
    assert len(both.attentions) == 2
    assert len(both.hidden_states) == 3
    fuse(model)
    close(model(IMAGES, output_hidden_states=True), states)
    close(model(IMAGES, **wanted), both)
    # transformers' hooks stay behind; they must not keep the fused path from running.
    forbid_originals(monkeypatch)
    close(model(IMAGES, output_hidden_states=True), states)


@torch.no_grad()
def test_attentions_asked_for_by_the_config():
    model = make(attn="eager")
    model.config.output_attentions = True
    want = model(IMAGES)
    fuse(model)
    close(model(IMAGES), want)
    model.config.output_attentions = False
    assert "attentions" not in model(IMAGES)


@torch.no_grad()
def test_a_user_s_hook_on_the_attention_gets_the_weights():
    model = make(attn="eager")
    seen = []
    fuse(model)
    layers(model)[0].attention.register_forward_hook(lambda m, i, out: seen.append(out[1]))
    model(IMAGES)
    assert seen[0].shape == (3, 2, 6, 6)
    assert "attention: it has a hook" in layers(model)[0].interrupted()


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    model.save_pretrained(tmp_path / "fused")
    from safetensors.torch import load_file

    plain, again = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "fused"))
    assert list(plain) == list(again)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    loaded = type(model).from_pretrained(tmp_path / "fused").eval()
    assert not any(isinstance(m, Fused) for m in loaded.modules())
    fuse(loaded)
    with torch.no_grad():
        close(loaded(IMAGES), model(IMAGES))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_agree(checkpointing):
    model = make().train()
    want = step(model)
    fuse(model)
    if checkpointing:
        model.gradient_checkpointing_enable()  # deprecated, and older releases know no other
        calls = []
        layers(model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    got = step(model)
    assert list(got) == list(want)
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], atol=1e-4, rtol=1e-4)
    if checkpointing:
        assert len(calls) == 2  # forward, and again in backward


@pytest.mark.parametrize(
    "option", ["hidden_dropout_prob", "attention_probs_dropout_prob"], ids=["hidden", "attention"]
)
def test_dropout_in_training_runs_the_original(option):
    model = make(attn="eager", **{option: 0.5}).train()

    def run():
        torch.manual_seed(3)
        return model(IMAGES).logits.detach()

    want = run()
    assert "drops 0.5 in training" in str(fuse(model))
    torch.testing.assert_close(run(), want, atol=2e-5, rtol=1e-4)
    assert "plain for now" not in str(fuse(model.eval()))


def test_an_older_layout_is_refused_with_a_reason(monkeypatch):
    """transformers 4 has no DeiTMLP. Its ViT multiplies the argument that is the mask here."""
    spec = importlib.util.spec_from_file_location("old_layout", huggingface.__file__)
    old = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.delattr(modeling_deit, "DeiTMLP")
        patch.setattr(transformers, "__version__", "4.57.1")
        spec.loader.exec_module(old)
    assert old.LEAVES == old.BLOCKS == {}
    for name in ("LEAVES", "BLOCKS", "REFUSED"):
        monkeypatch.setattr(huggingface, name, getattr(old, name))
    model = make()
    report = fuse(model)
    assert "transformers 4.57.1 lays it out otherwise" in report.left["deit.layers.0"]
    assert not isinstance(layers(model)[0], Fused)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"hidden_act": "relu"}, "not GELU, QuickGELU or SiLU"), ({}, "q_proj is a")],
)
def test_what_cannot_be_fused_is_named(options, reason):
    class Adapted(nn.Linear):
        pass

    model = make(**options)
    if not options:
        layers(model)[0].attention.q_proj = Adapted(64, 64)
    report = fuse(model)
    assert any(reason in why for why in report.left.values())
    assert not isinstance(layers(model)[0], Fused)


def test_unfuse_restores_classes_and_attributes(model):
    kinds = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    fuse(model)
    assert original_class(layers(model)[0]) is kinds[list(model.modules()).index(layers(model)[0])]
    unfuse(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes


@torch.no_grad()
def test_autocast():
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(IMAGES).logits
        fuse(model)
        got = model(IMAGES).logits
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=5e-2, rtol=5e-2)


@torch.no_grad()
def test_a_forward_replaced_on_an_instance_is_called():
    """accelerate's offloading wraps a Linear this way while its weight is on another device."""
    model = make()
    fuse(model)
    linear = layers(model)[0].mlp.fc1
    calls = []
    plain = linear.forward
    linear.forward = lambda x: calls.append(1) or plain(x)
    model(IMAGES)
    assert calls == [1]
    layer = layers(unfuse(model))[1]
    layer.forward = layer.forward
    assert "forward was replaced" in fuse(model).left["deit.layers.1"]
