"""fuse() on Hugging Face's DINOv2 (registers, SwiGLU), CLIP, SigLIP, SigLIP 2, AIMv2 and others."""

import inspect
import pickle

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import transformers  # isort: skip

from fusing import forbid_originals
from hf import close

from deit.fused_vit import fuse, unfuse
from deit.fused_vit.modules import Fused

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWER = {**SIZES, "intermediate_size": 96}
DINOV2 = {**SIZES, "mlp_ratio": 2, "layerscale_value": 0.7, "num_labels": 10}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 12,
}


def _patches():
    """What SigLIP 2 takes: patches, which of them are padding, and how many a side."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(3, 16, 192, generator=generator),
        "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 3),
    }


def _of(prefix):
    return (
        getattr(transformers, f"{prefix}ForImageClassification"),
        getattr(transformers, f"{prefix}Config"),
    )


VISION2 = {
    **{name: TOWER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
    "num_attention_heads": 2,
    "patch_size": 8,
    "num_patches": 16,
}
# The class of the model, of its configuration, what it is given, and where its layers are.
KINDS = {
    "dinov2": (*_of("Dinov2"), DINOV2, "dinov2.encoder.layer"),
    "dinov2 swiglu": (*_of("Dinov2"), DINOV2 | {"use_swiglu_ffn": True}, "dinov2.encoder.layer"),
    "dinov2 registers": (
        *_of("Dinov2WithRegisters"),
        DINOV2 | {"num_register_tokens": 3},
        "dinov2_with_registers.encoder.layer",
    ),
    "dinov2 backbone": (
        transformers.Dinov2Backbone,
        transformers.Dinov2Config,
        DINOV2 | {"out_features": ["stage1", "stage2"]},
        "encoder.layer",
    ),
    "dinov2 registers swiglu": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        DINOV2 | {"use_swiglu_ffn": True},
        "encoder.layer",
    ),
    "clip": (
        transformers.CLIPVisionModel,
        transformers.CLIPVisionConfig,
        TOWER,
        "encoder.layers",
    ),
    "clip embeddings": (
        transformers.CLIPVisionModelWithProjection,
        transformers.CLIPVisionConfig,
        TOWER | {"projection_dim": 24, "hidden_act": "gelu"},
        "vision_model.encoder.layers",
    ),
    "siglip": (
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig,
        TOWER,
        "encoder.layers",
    ),
    "metaclip 2": (
        transformers.MetaClip2VisionModel,
        transformers.MetaClip2VisionConfig,
        TOWER,
        "encoder.layers",
    ),
    "ijepa": (*_of("IJepa"), TOWER | {"num_labels": 10}, "ijepa.layers"),
    "msn": (*_of("ViTMSN"), TOWER | {"num_labels": 10}, "vit.layers"),
    "mae": (
        transformers.ViTMAEModel,
        transformers.ViTMAEConfig,
        TOWER | {"mask_ratio": 0.0},
        "layers",
    ),
    "siglip2": (
        transformers.Siglip2VisionModel,
        transformers.Siglip2VisionConfig,
        VISION2,
        "encoder.layers",
    ),
    "aimv2": (
        transformers.Aimv2VisionModel,
        transformers.Aimv2VisionConfig,
        TOWER,
        "encoder.layers",
    ),
}
if hasattr(transformers, "PixioModel"):
    KINDS["pixio"] = (
        transformers.PixioModel,
        transformers.PixioConfig,
        SIZES | {"mlp_ratio": 2, "n_cls_tokens": 3},
        "layers",
    )
ACTIVATIONS = {"clip": "quick_gelu", "siglip": "gelu_tanh", "siglip2": "gelu_tanh"}


def make(kind, attn="sdpa", dtype=torch.float32, **options):
    """A small model with no parameter at its initial zero or one."""
    model_class, config_class, given, _ = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**given | options, attn_implementation=attn))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def layers(model, kind):
    return list(model.get_submodule(KINDS[kind][3]))


def run(model, **options):
    dtype = next(model.parameters()).dtype
    given = _patches() if "Siglip2" in type(model).__name__ else {"pixel_values": IMAGES}
    given["pixel_values"] = given["pixel_values"].to(dtype)
    if "MAE" in type(model).__name__:  # or it shuffles
        given["noise"] = torch.arange(16.0).expand(3, -1)
    return model(**given, **options)


def values(output):
    """The tensors that an output holds."""
    found = output.values() if isinstance(output, dict) else output
    tensors = [t for t in found if isinstance(t, torch.Tensor)]
    for inner in found:
        if isinstance(inner, (tuple, list, dict)):
            tensors += values(inner)
    return tensors


def gradients(model, **options):
    model.zero_grad()
    sum(t.square().sum() for t in values(run(model, **options))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_outputs_by_the_fused_layers(kind, attn, monkeypatch):
    model = make(kind, attn)
    want = run(model), run(model, output_hidden_states=True)
    report = fuse(model)
    assert all(isinstance(layer, Fused) for layer in layers(model, kind))
    assert not any(KINDS[kind][3] in name for name in report.left)
    forbid_originals(monkeypatch)
    close(run(model), want[0])
    close(run(model, output_hidden_states=True), want[1])
    assert len(values(want[0])) >= 1


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_same_outputs_in_fp64(kind, monkeypatch):
    model = make(kind, dtype=torch.float64)
    want = run(model)
    fuse(model)
    if kind != "aimv2":  # its norms compute in fp32
        forbid_originals(monkeypatch)
    close(run(model), want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree(kind, dtype):
    model = make(kind, dtype=dtype).train()
    want = gradients(model)
    fuse(model)
    got = gradients(model)
    assert list(got) == list(want)
    near = 1e-12 if dtype == torch.float64 else 1e-5
    most = max(float(grad.abs().max()) for grad in want.values())  # a key's bias has none
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], atol=near * most, rtol=100 * near)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "dinov2 swiglu", "clip", "siglip"])
def test_attentions_asked_for_are_as_before(kind):
    model = make(kind, "eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    want = run(model, **asked)
    assert len(want.attentions) == 2
    fuse(model)
    close(run(model, **asked), want)
    close(run(model), run(unfuse(model)))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_dropout_in_training_runs_the_original(kind):
    option = "attention_probs_dropout_prob" if kind == "dinov2" else "attention_dropout"
    model = make(kind, "eager", **{option: 0.5}).train()

    def seeded():
        torch.manual_seed(3)
        return run(model).last_hidden_state if kind != "dinov2" else run(model).logits

    want = seeded().detach()
    assert "drops 0.5 in training" in str(fuse(model))
    torch.testing.assert_close(seeded().detach(), want, atol=2e-5, rtol=1e-4)
    assert "plain for now" not in str(fuse(model.eval()))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 registers", "pixio"])
def test_stochastic_depth_draws_as_before(kind):
    model = make(kind, drop_path_rate=0.5).train()

    def seeded():
        torch.manual_seed(5)
        return values(run(model))[0].detach()

    want = seeded()
    fuse(model)
    torch.testing.assert_close(seeded(), want, atol=1e-4, rtol=1e-4)
    assert (values(run(model.eval()))[0] - want).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("clip", ("mlp.activation_fn", "mlp", "layer_norm1", "self_attn.out_proj")),
        ("dinov2 swiglu", ("mlp.act_fn", "mlp.up_proj", "mlp", "norm1", "layer_scale2")),
    ],
)
def test_hooks_on_parts_run_the_original(kind, parts):
    model = make(kind)
    fuse(model)
    seen = []
    for part in parts:
        module = layers(model, kind)[0].get_submodule(part)
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        run(model)
        handle.remove()
    assert len(seen) == len(parts)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_whole_clip_texts_keep_their_causal_mask(attn):
    config = transformers.CLIPConfig(
        vision_config=TOWER, text_config=TEXT | {"eos_token_id": 49}, projection_dim=24
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel._from_config(config, attn_implementation=attn).eval()
    ids = torch.randint(1, 48, (3, 9), generator=torch.Generator().manual_seed(2))
    ids[:, 8] = 49
    padding = torch.ones_like(ids)
    padding[1, 6:] = 0
    given = {"pixel_values": IMAGES, "input_ids": ids}
    want = [model(**given), model(**given, attention_mask=padding)]
    fuse(model)
    for each, mask in zip(want, (None, padding), strict=True):
        got = model(**given, attention_mask=mask)
        close(got.logits_per_image, each.logits_per_image)
        close(got.text_embeds, each.text_embeds)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Siglip", "Aimv2"])
def test_texts_and_padding_are_as_before(name):
    model_class, config_class = (getattr(transformers, name + kind) for kind in ("Model", "Config"))
    torch.manual_seed(0)
    model = model_class(config_class(vision_config=TOWER, text_config=TEXT)).eval()
    ids = torch.randint(1, 48, (3, 9), generator=torch.Generator().manual_seed(2))
    padding = torch.ones_like(ids)
    padding[1, 6:] = 0
    given = {"pixel_values": IMAGES, "input_ids": ids}
    want = [model(**given), model(**given, attention_mask=padding)]
    fuse(model)
    for each, mask in zip(want, (None, padding), strict=True):
        got = model(**given, attention_mask=mask)
        close(got.logits_per_text, each.logits_per_text)


@torch.no_grad()
def test_siglip2_s_padded_patches_are_as_before():
    model = make("siglip2")
    given = _patches()
    given["pixel_attention_mask"][1, 12:] = 0
    given["spatial_shapes"][1] = torch.tensor([3, 4])
    want = model(**given)
    fuse(model)
    close(model(**given), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "dinov2 swiglu", "dinov2", "aimv2"])
def test_8_bits(kind):
    model = make(kind)
    want = run(model)
    assert "qkv, proj, fc1, fc2 in int8" in str(fuse(model, dtype="int8"))
    for got, exact in zip(values(run(model)), values(want), strict=True):
        error = (got - exact).norm() / exact.norm()
        assert 0 < error < 0.05


@torch.no_grad()
@pytest.mark.parametrize(("kind", "name"), ACTIVATIONS.items())
def test_each_has_its_own_activation(kind, name):
    model = make(kind)
    want = run(model)
    fuse(model, "cpu", block="parts")
    assert layers(model, kind)[0].mlp.activation_name() == name
    parts = run(model)
    report = fuse(model, "cpu", block="whole")
    notes = [row.note for row in report.rows if row.kind.endswith("EncoderLayer")]
    assert notes == ["whole in inference"] * 2
    whole = run(model)
    close(whole, want)
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(parts), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "silu"])
def test_activations_by_other_names(name):
    for dtype in (torch.float32, torch.float64):
        model = make("clip", dtype=dtype, hidden_act=name)
        want = run(model)
        fuse(model)
        assert isinstance(layers(model, "clip")[0], Fused)
        near = {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 else {}
        close(run(model), want, **near)


PAIRS = "its attention adds a bias for every pair of positions"


@pytest.mark.parametrize("prefix", ["Beit", "Data2VecVision"])
def test_a_bias_for_every_pair_is_refused_by_name(prefix):
    config = getattr(transformers, f"{prefix}Config")(**TOWER)
    report = fuse(getattr(transformers, f"{prefix}Model")(config))
    why = [note for note in report.left.values() if note == PAIRS]
    assert why == [PAIRS] * 2


def test_an_unknown_activation_is_left_and_named():
    model = make("clip", hidden_act="relu")
    report = fuse(model)
    assert any("not GELU, QuickGELU or SiLU" in why for why in report.left.values())
    assert not isinstance(layers(model, "clip")[0], Fused)


def test_an_older_layout_is_refused_with_a_reason():
    from deit.fused_vit import huggingface

    class Layer(torch.nn.Module):
        def forward(self, hidden_states, attention_mask, output_attentions=False):
            return hidden_states

    refused = {}
    assert not huggingface.served(Layer, Layer, refused)
    assert "lays it out otherwise" in refused[Layer]
    assert list(inspect.signature(Layer.forward).parameters)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "dinov2 swiglu", "siglip"])
def test_compiles_in_one_graph(kind):
    model = make(kind)
    fuse(model)
    layer, x = layers(model, kind)[0], torch.randn(2, 17, 64)
    want = layer(x, None)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, None), want)


@pytest.mark.parametrize("kind", ["clip", "msn", "dinov2 swiglu"])
def test_a_fused_model_is_pickled(kind):
    model = make(kind)
    fuse(model)
    again = pickle.loads(pickle.dumps(model))
    assert all(isinstance(layer, Fused) for layer in layers(again, kind))
    with torch.no_grad():
        close(run(again), run(model), atol=0.0, rtol=0.0)
