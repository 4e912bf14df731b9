"""A fused root embeds by one operator, and step by step wherever that would not be the same."""

import pytest
import torch
from test_fused_int8 import ran

import deit
from deit.fused_vit import fuse, unfuse
from deit.kernels.engine import native

timm = pytest.importorskip("timm")
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SMALL = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 10}
NATIVE = "reference" if native.why_not("cpu") else "cpu"
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def ours(**options):
    return deit.model.DeiT(deit.Config("small", **SMALL, **options))


def build(maker, **options):
    torch.manual_seed(0)
    return maker(**options).eval()


BUILDERS = {
    "ours": lambda: build(ours),
    "ours, distilled": lambda: build(ours, distilled=True),
    "timm": lambda: build(VisionTransformer, **SMALL),
    "timm, distilled": lambda: build(VisionTransformerDistilled, **SMALL),
}
# Models that the operator does not cover: they have tokens of their own or take other images.
UNUSUAL = {
    "registers": {"reg_tokens": 2},
    "positions without the class token": {"no_embed_class": True},
    "images of any size": {"dynamic_img_size": True},
    "padded images": {"dynamic_img_pad": True},
    "no positions": {"pos_embed": "none"},
}


def embeds_by(model, images=IMAGES):
    """The implementation of patch_embed that runs in a call; None where none does."""
    found = [name for operator, name in ran(lambda: model(images)) if operator == "patch_embed"]
    return found[0] if found else None


@pytest.mark.parametrize("name", BUILDERS)
def test_one_operator_gives_the_same_logits(name):
    model = BUILDERS[name]()
    with torch.inference_mode():
        expected = model(IMAGES)
        report = fuse(model)
        assert embeds_by(model) == NATIVE
        assert report.operators["patch_embed"] == NATIVE
        assert not any(row.name.startswith("patch_embed") for row in report.rows)
        assert "step by step" not in str(report)
        torch.testing.assert_close(model(IMAGES), expected, rtol=2e-5, atol=2e-6)
        unfuse(model)
        assert torch.equal(model(IMAGES), expected)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_it_does_not_compute_goes_step_by_step(name):
    model = build(VisionTransformer, **SMALL, **UNUSUAL[name])
    with torch.inference_mode():
        expected = model(IMAGES)
        report = fuse(model)
        assert "embedded step by step: " in str(report)
        assert "patch_embed" not in report.operators
        assert embeds_by(model) is None
        torch.testing.assert_close(model(IMAGES), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("watched", ["patch_embed", "patch_embed.proj"])
def test_hooks_still_see_their_module(name, watched):
    model = BUILDERS[name]()
    fuse(model)
    seen = []
    handle = model.get_submodule(watched).register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        assert embeds_by(model) is None
        assert seen
        handle.remove()
        assert embeds_by(model) == NATIVE


@pytest.mark.parametrize(("name", "step"), [("ours", "embed"), ("timm", "_pos_embed")])
def test_a_replaced_step_runs(name, step):
    model = BUILDERS[name]()
    fuse(model)
    original, seen = getattr(model, step), []
    setattr(model, step, lambda *given: seen.append(1) or original(*given))
    with torch.inference_mode():
        model(IMAGES)
    assert seen


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_reach_every_parameter_and_the_images(name):
    model, images = BUILDERS[name](), IMAGES.clone().requires_grad_()
    model(images).square().sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    shown = images.grad.clone()
    model.zero_grad()
    images.grad = None
    fuse(model)
    model(images).square().sum().backward()
    torch.testing.assert_close(images.grad, shown, rtol=1e-4, atol=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_have_the_strides_of_their_parameters(name, fused):
    """With other strides, DDP warns of them and copies each gradient."""
    model = BUILDERS[name]()
    if fused:
        fuse(model)
        assert embeds_by(model) is not None
    model(IMAGES).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), key


@pytest.mark.parametrize("name", BUILDERS)
def test_autocast_keeps_the_stream_in_fp32(name):
    """The original adds fp32 positions to bf16 patches: the operator would narrow the sum."""
    model = BUILDERS[name]()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        fuse(model)
        assert embeds_by(model) is None


def test_positions_that_drop_go_step_by_step():
    model = build(VisionTransformer, **SMALL, pos_drop_rate=0.5)
    fuse(model)
    with torch.no_grad():
        assert embeds_by(model) == NATIVE
        model.train()
        assert embeds_by(model) is None


def test_images_of_another_size_are_refused_as_before():
    model = BUILDERS["timm"]()
    fuse(model)
    with torch.inference_mode(), pytest.raises(AssertionError, match="doesn't match model"):
        model(IMAGES[..., :16])
