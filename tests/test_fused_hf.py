"""fuse() and register_hf() on Hugging Face's DeiT and ViT."""

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.0")

from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

import transformers  # isort: skip  (importing the models has put another module in its place)

from deit.fused_vit import attention_interface, fuse, huggingface, register_hf, unfuse
from deit.fused_vit.modules import Fused, original_class

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SIZES = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "num_labels": 10,
}
KINDS = {
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig),
    "deit teacher": (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig),
    "vit features": (transformers.ViTModel, transformers.ViTConfig),
}


def make(kind="deit", attn="sdpa", **options):
    """A small model with no parameter at its initial zero or one."""
    model_class, config_class = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, attn_implementation=attn, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def layers(model):
    return getattr(model, model.base_model_prefix, model).layers


def close(got, want, **tolerance):
    """Two model outputs: the same fields in the same order, the same values to rounding."""
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        tolerance = tolerance or {"atol": 2e-5, "rtol": 1e-4}
        torch.testing.assert_close(got, want, **tolerance)
        return
    assert len(got) == len(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
        got, want = got.values(), want.values()
    for a, b in zip(got, want, strict=True):
        close(a, b, **tolerance)


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


def forbid_originals(monkeypatch):
    for kind in (modeling_deit.DeiTLayer, modeling_vit.ViTLayer):
        monkeypatch.setattr(kind, "forward", lambda *_, **__: pytest.fail("it ran unfused"))


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


def step(model):
    model.zero_grad()
    model(IMAGES).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_agree(checkpointing):
    model = make().train()
    want = step(model)
    fuse(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
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


# Every way in which a weight changes between two calls in inference.
def by_optimizer(model):
    step(model)
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def by_load_state_dict(model):
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})


def by_assignment(model):
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_data(model):
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data


def behind_the_version_counter(model):
    """As optimizers outside PyTorch do: nothing but train() and eval() tells."""
    model.train()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.eval()


def behind_it_after_a_training_step(model):
    step(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def by_dtype(model):
    model.double()


def by_bias_alone(model):
    with torch.no_grad():
        layers(model)[0].attention.v_proj.bias.add_(1.0)


CHANGES = [
    by_optimizer,
    by_load_state_dict,
    by_assignment,
    by_data,
    behind_the_version_counter,
    behind_it_after_a_training_step,
    by_dtype,
    by_bias_alone,
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_packed_weight_follows(change):
    model = make()
    fuse(model)
    with torch.inference_mode():
        before = model(IMAGES).logits
    change(model)
    images = IMAGES.to(next(model.parameters()).dtype)
    with torch.no_grad():
        got = model(images)
        assert (got.logits - before).abs().max() > 1e-3 or change is by_dtype
        close(got, unfuse(model)(images))


@torch.no_grad()
def test_the_packed_weight_is_kept_and_is_no_state(monkeypatch):
    model = make()
    names = list(model.state_dict())
    packed = []
    pack = huggingface._pack
    monkeypatch.setattr(huggingface, "_pack", lambda t: packed.append(1) or pack(t))
    fuse(model)
    for _ in range(3):
        model(IMAGES)
    assert len(packed) == 2  # once a layer
    assert list(model.state_dict()) == names
    assert not any("pack" in name for name, _ in model.named_buffers())


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_starts_with_no_packed_weight(copied):
    """It would double a checkpoint of the module, and a copy's version counters start again."""
    model = make()
    fuse(model)
    model(IMAGES)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    duplicate = copied(model)
    assert isinstance(layers(duplicate)[0], Fused)
    assert layers(model)[0].attention.fused_packed.kept is not None
    assert layers(duplicate)[0].attention.fused_packed.kept is None
    close(duplicate(IMAGES), model(IMAGES))
    close(duplicate(IMAGES), unfuse(model)(IMAGES))


def test_frozen_weights_still_carry_gradients_to_the_images():
    model = make().requires_grad_(False)
    fuse(model)
    with torch.inference_mode():
        model(IMAGES)  # fills the cache
    images = IMAGES.clone().requires_grad_()
    (got,) = torch.autograd.grad(model(images).logits.square().sum(), images)
    unfuse(model)
    (want,) = torch.autograd.grad(model(images).logits.square().sum(), images)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_functional_call_uses_the_given_weights():
    model = make()
    fuse(model)
    with torch.no_grad():
        before = model(IMAGES).logits
        doubled = {name: 1.5 * p for name, p in model.named_parameters()}
        got = torch.func.functional_call(model, doubled, (IMAGES,)).logits
        torch.testing.assert_close(model(IMAGES).logits, before)
        unfuse(model)
        want = torch.func.functional_call(model, doubled, (IMAGES,)).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


# Two prefix tokens and four patches: six keys.
PADDING = torch.ones(3, 6, dtype=torch.long)
PADDING[0, 4:] = 0
PADDING[2, 1] = 0
CAUSAL = torch.ones(6, 6).tril().bool().expand(3, 1, 6, 6)
MASKS = {
    "padding": PADDING,
    "nothing hidden": torch.ones(3, 6),
    "rows": PADDING.bool()[:, None, None, :],
    "dense rows": PADDING.bool()[:, None, None, :].expand(3, 1, 6, 6).contiguous(),
    "causal": CAUSAL,
    "additive": torch.zeros(3, 1, 6, 6).masked_fill(~CAUSAL, -1e4),
    "a bias of each key": torch.randn(3, 1, 1, 6, generator=torch.Generator().manual_seed(2)),
}


def masked(model, mask):
    if (
        model.config._attn_implementation == "eager"
        and mask.dtype == torch.bool
        and mask.dim() == 4
    ):
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return model(IMAGES, attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("attn", ["eager", "sdpa", "deit_fused"])
@pytest.mark.parametrize("fusing", [False, True])
def test_masks_are_honoured(attn, fusing, name):
    register_hf()
    want = masked(make(attn="eager"), MASKS[name])
    model = make(attn=attn)
    if fusing:
        fuse(model)
    close(masked(model, MASKS[name]), want)


@torch.no_grad()
def test_registered_attention_runs_the_operator(monkeypatch):
    calls = []
    operator = attention_interface.attention

    def spy(*args, **kwargs):
        calls.append(kwargs["key_bias"])
        return operator(*args, **kwargs)

    monkeypatch.setattr(attention_interface, "attention", spy)
    register_hf(impl="reference")
    model, plain = make(attn="deit_fused"), make()
    close(model(IMAGES), plain(IMAGES))
    assert calls == [None, None]
    model(IMAGES, attention_mask=PADDING)
    assert calls[2].shape == (3, 6)
    model(IMAGES, attention_mask=CAUSAL)
    assert len(calls) == 4  # SDPA's
    plain.set_attn_implementation("deit_fused")
    plain(IMAGES)
    assert len(calls) == 6


def test_registered_attention_trains_with_dropout():
    register_hf()
    options = {"attention_probs_dropout_prob": 0.5}
    got, want = make(attn="deit_fused", **options).train(), make(attn="sdpa", **options).train()
    outputs = []
    for model in (got, want):
        torch.manual_seed(1)
        outputs.append(model(IMAGES).logits)
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


def test_key_bias_is_taken_from_strides_alone():
    row = torch.zeros(3, 1, 1, 6)
    assert attention_interface.as_key_bias(row.expand(3, 2, 6, 6), 3, 6).shape == (3, 6)
    assert attention_interface.as_key_bias(row[:1], 3, 6).shape == (3, 6)
    assert attention_interface.as_key_bias(torch.zeros(3, 1, 6, 6), 3, 6) is None
    assert attention_interface.as_key_bias(torch.zeros(3, 2, 1, 6), 3, 6) is None
    assert attention_interface.as_key_bias(torch.zeros(3, 1, 1, 6).int(), 3, 6) is None
    assert attention_interface.as_key_bias(row, 3, 7) is None
    hidden = attention_interface.as_key_bias(PADDING.bool()[:, None, None, :], 3, 6)
    assert torch.equal(hidden == float("-inf"), PADDING == 0)


def test_register_refuses(monkeypatch):
    with pytest.raises(ValueError, match="impl: expected 'auto' or one of"):
        register_hf(impl="tpu")
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"version 5 or later; got 4\.57\.1"):
        register_hf()


def test_an_older_layout_is_refused_with_a_reason(monkeypatch):
    """transformers 4 has no DeiTMLP; its ViT multiplies what comes where the mask does."""
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
    ("options", "reason"), [({"hidden_act": "gelu_new"}, "not the exact GELU"), ({}, "q_proj is a")]
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
    """accelerate's offloading wraps a Linear so, while its weight is away on another device."""
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


def test_saving_and_loading_as_deit_fused(tmp_path):
    """The name is chosen anew at every loading, as transformers does it: no file holds it."""
    register_hf()
    model = make(attn="deit_fused")
    model.save_pretrained(tmp_path)
    assert "deit_fused" not in (tmp_path / "config.json").read_text()
    load = transformers.DeiTForImageClassification.from_pretrained
    plain, loaded = load(tmp_path), load(tmp_path, attn_implementation="deit_fused")
    assert loaded.config._attn_implementation == "deit_fused"
    with torch.no_grad():
        close(loaded.eval()(IMAGES), plain.eval()(IMAGES))
        close(loaded(IMAGES, output_hidden_states=True), plain(IMAGES, output_hidden_states=True))
    with pytest.raises(ValueError, match="`output_attentions` attribute is not supported"):
        loaded.config.output_attentions = True


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
# Their masks: padding, causal, causal over keys that heads share, a bias of positions.
OTHERS = {
    "bert": lambda: transformers.BertConfig(**TEXT, intermediate_size=64),
    "clip text": lambda: transformers.CLIPTextConfig(
        **TEXT, intermediate_size=64, bos_token_id=0, eos_token_id=1
    ),
    "llama": lambda: transformers.LlamaConfig(
        **TEXT, intermediate_size=64, num_key_value_heads=2
    ),
    "t5": lambda: transformers.T5Config(d_model=32, d_kv=16, num_layers=2, num_heads=2, d_ff=64,
                                        vocab_size=50),
}  # fmt: skip
CLASSES = {
    "bert": transformers.BertModel,
    "clip text": transformers.CLIPTextModel,
    "llama": transformers.LlamaForCausalLM,
    "t5": transformers.T5EncoderModel,
}


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_that_take_attention_from_the_interface(kind, padded):
    """Masks that the kernel cannot take go to SDPA; none is dropped."""
    register_hf()
    ids = torch.randint(2, 50, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0 if padded else 1
    found = []
    for attn in ("eager", "deit_fused"):
        torch.manual_seed(0)
        model = CLASSES[kind]._from_config(OTHERS[kind](), attn_implementation=attn).eval()
        found.append(model(ids, attention_mask=mask)[0][mask.bool()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_across_two_sequences():
    """Queries of one length, keys of another: not packed, and so not the kernel's."""
    register_hf()
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50,
    )  # fmt: skip
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(3))
    found = []
    for attn in ("eager", "deit_fused"):
        torch.manual_seed(0)
        model = transformers.BartModel._from_config(config, attn_implementation=attn).eval()
        found.append(model(ids, decoder_input_ids=ids[:, :5])[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
