"""fuse() on torchvision's VisionTransformer."""

import copy
import pickle

import pytest
import torch
from fusing import forbid_originals
from torch import nn
from torchvision.models import vision_transformer

from deit.fused_vit import fuse, unfuse
from deit.fused_vit.modules import Fused, original_class

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LAYERS = ["encoder_layer_0", "encoder_layer_1"]


def make(**options):
    """A small ViT with no parameter at its initial zero or one."""
    torch.manual_seed(0)
    model = vision_transformer.VisionTransformer(
        image_size=32,
        patch_size=16,
        num_layers=2,
        num_heads=2,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=10,
        **options,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("train", [False, True])
def test_same_logits_by_the_fused_blocks(train, monkeypatch):
    model = make().train(train)  # in eval the original takes MultiheadAttention's own fast path
    with torch.no_grad():
        want = model(IMAGES)
        report = fuse(model)
        assert [f"encoder.layers.{name}" for name in LAYERS] == [
            name for name in report.fused if name.count(".") == 2
        ]
        assert not any("self_attention" in name for name in report.left)
        forbid_originals(monkeypatch)
        torch.testing.assert_close(model(IMAGES), want, atol=2e-5, rtol=1e-5)


def test_gradients_agree():
    model = make().train()

    def step():
        model.zero_grad()
        model(IMAGES).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want = step()
    fuse(model)
    for name, grad in step().items():
        torch.testing.assert_close(grad, want[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"attention_dropout": 0.5}])
def test_dropout_in_training_runs_the_original(options):
    model = make(**options).train()

    def run():
        torch.manual_seed(5)
        return model(IMAGES).detach()

    want = run()
    assert "drops 0.5 in training" in str(fuse(model))
    torch.testing.assert_close(run(), want, atol=2e-5, rtol=1e-5)
    assert "drops" not in str(fuse(model.eval()))


@torch.no_grad()
@pytest.mark.parametrize("where", ["self_attention", "mlp.0", "mlp.1", "ln_2", "dropout", "mlp"])
def test_hooks_run(where):
    model = make()
    seen = []
    fuse(model)
    layer = model.encoder.layers[1]
    layer.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    model(IMAGES)
    assert seen == [1]
    assert "hook" in layer.interrupted()


@torch.no_grad()
def test_state_copies_and_unfuse():
    model = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    want = model(IMAGES)
    fuse(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(duplicate.encoder.layers[0], Fused)
        torch.testing.assert_close(duplicate(IMAGES), want, atol=2e-5, rtol=1e-5)
    unfuse(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes


def other_keys(layer):
    layer.self_attention = nn.MultiheadAttention(64, 2, batch_first=True, add_zero_attn=True)


def separate_projections(layer):
    layer.self_attention = nn.MultiheadAttention(64, 2, batch_first=True, kdim=64, vdim=64)
    layer.self_attention.in_proj_weight = None


def other_activation(layer):
    layer.mlp[1] = nn.ReLU()


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_keys, "adds keys of its own"),
        (separate_projections, "no packed in_proj_weight"),
        (other_activation, "not GELU, QuickGELU or SiLU"),
    ],
)
def test_what_differs_is_left_and_named(change, reason):
    model = make()
    change(model.encoder.layers[0])
    report = fuse(model)
    assert any(reason in why for why in report.left.values())
    assert not isinstance(model.encoder.layers[0], Fused)
    assert isinstance(model.encoder.layers[1], Fused)


@torch.no_grad()
def test_a_change_after_fusing_is_seen():
    model = make()
    fuse(model)
    other_activation(model.encoder.layers[0])
    got = model(IMAGES)
    torch.testing.assert_close(got, unfuse(model)(IMAGES), atol=2e-5, rtol=1e-5)


def test_a_wrong_rank_is_reported_by_torchvision():
    layer = make().encoder.layers[0]
    fuse(layer)
    assert original_class(layer) is vision_transformer.EncoderBlock
    with pytest.raises(AssertionError, match="Expected"):
        layer(torch.randn(5, 64))
