"""fuse() on timm's ViTs of other families, and everything that they are asked for.

Registers, LayerScale, GELU by tanh, QuickGELU, SwiGLU, RMSNorm; features, intermediate layers,
embeddings pooled by class token, mean or attention, images of any size, and NaFlex's batches of
many sizes.
"""

from functools import partial

import pytest
import timm
import torch
from fusing import IMAGES, blocks, filled, forbid_originals
from fusing import timms as vision_transformer
from timm.layers import RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vitamin import GeGluMlp

from deit.fused_vit import fuse, unfuse
from deit.fused_vit.modules import Fused

FAMILIES = {
    "deit": {},
    "dinov2": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5, "class_token": True},
    "giant": {"mlp_layer": SwiGLUPacked, "init_values": 0.5},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": "silu"},
    "inner norm": {"mlp_layer": SwiGLU, "act_layer": "silu", "scale_mlp_norm": True},
    "clip": {"act_layer": "quick_gelu", "pre_norm": True},
    "siglip": {"act_layer": "gelu_tanh", "class_token": False, "global_pool": "map"},
    "gap": {"class_token": False, "global_pool": "avg", "fc_norm": True},
    "silu": {"act_layer": "silu", "reg_tokens": 1},
    "final norm off": {"final_norm": False, "global_pool": "avg"},
    "max and mean": {"global_pool": "avgmax"},
    "aimv2": {
        "norm_layer": partial(RmsNorm, eps=1e-5),
        "embed_norm_layer": partial(RmsNorm, eps=1e-5),
        "mlp_layer": SwiGLU,
        "act_layer": "silu",
        "class_token": False,
        "global_pool": "avg",
        "qkv_bias": False,
        "proj_bias": False,
    },
    "rms norm": {"norm_layer": "rmsnorm", "init_values": 0.5},
    "vitamin": {"mlp_layer": GeGluMlp, "class_token": False, "global_pool": "avg"},
}


def make(family, **options):
    torch.manual_seed(0)
    return filled(vision_transformer(**FAMILIES[family] | options))


def near(got, want, dtype=torch.float32):
    """Outputs of any nesting, to rounding."""
    if isinstance(want, torch.Tensor):
        tight = {"atol": 1e-11, "rtol": 1e-10}
        tolerance = tight if dtype == torch.float64 else {"atol": 5e-5, "rtol": 2e-4}
        torch.testing.assert_close(got, want, **tolerance)
        return
    assert type(got) is type(want)
    assert len(got) == len(want)
    pairs = (got.values(), want.values()) if isinstance(want, dict) else (got, want)
    for a, b in zip(*pairs, strict=True):
        near(a, b, dtype)


# What a model is asked for, beside its logits.
ASKED = {
    "logits": lambda m, x: m(x),
    "forward_features": lambda m, x: m.forward_features(x),
    "pooled": lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    "intermediates": lambda m, x: m.forward_intermediates(x),
    "intermediates by name": lambda m, x: m.forward_intermediates(
        x, indices=[0], norm=True, return_prefix_tokens=True, output_fmt="NLC"
    ),
    "intermediates alone": lambda m, x: m.forward_intermediates(
        x, indices=1, intermediates_only=True, stop_early=True
    ),
    "intermediate layers": lambda m, x: m.get_intermediate_layers(x, n=2, reshape=True),
}


@torch.no_grad()
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_as_before(family, asked, monkeypatch):
    for dtype in (torch.float32, torch.float64):
        model, images = make(family).to(dtype), IMAGES.to(dtype)
        want = ASKED[asked](model, images)
        fuse(model)
        assert all(isinstance(block, Fused) for block in blocks(model, "timm"))
        with monkeypatch.context() as patch:
            forbid_blocks_originals(patch)
            near(ASKED[asked](model, images), want, dtype)


def forbid_blocks_originals(patch):
    """A root may run its own forward, where its pooling reads all tokens; nothing below it may."""
    runs = Fused.runs_fused

    def asked(self, x):
        found = runs(self, x)
        if not found and not hasattr(self, "blocks"):
            pytest.fail(f"{type(self).__name__} ran unfused")
        return found

    patch.setattr(Fused, "runs_fused", asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree(family):
    model = make(family).double().train()

    def step():
        model.zero_grad()
        features, intermediates = model.forward_intermediates(IMAGES.double())
        outputs = [model(IMAGES.double()), features, *intermediates]
        sum(t.square().sum() for t in outputs).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = step()
    fuse(model)
    got = step()
    assert list(got) == list(want)
    most = max(float(grad.abs().max()) for grad in want.values())
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], atol=1e-12 * most, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False], ids=["fused before", "fused after"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_features_only(name, before):
    options = {"features_only": True, "out_indices": (1, 3), "img_size": 32, "depth": 4}
    if "eva02" in name:
        options |= {"patch_size": 16}
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    want = model(IMAGES)
    report = fuse(model if before else model.model)
    assert sum("blocks" in n and n.count(".") <= 2 for n in report.fused) >= 4
    near(model(IMAGES), want)
    assert [len(w.shape) for w in want] == [4, 4]
    near(unfuse(model)(IMAGES), want)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg", "map", "max", ""])
@pytest.mark.parametrize("classes", [0, 10])
def test_embeddings_pooled_any_way(pool, classes):
    torch.manual_seed(0)
    model = vision_transformer(global_pool=pool)
    if classes == 0:
        model.reset_classifier(0)
    model = filled(model)
    want = model(IMAGES)
    fuse(model)
    near(model(IMAGES), want)
    model.reset_classifier(3, "avg")  # after fusing, too
    filled(model)
    got = model(IMAGES)
    near(got, unfuse(model)(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("family", ["deit", "dinov2", "siglip"])
@pytest.mark.parametrize("padded", [False, True])
def test_images_of_any_size(family, padded):
    model = make(family, dynamic_img_size=True, dynamic_img_pad=padded)
    sizes = [(32, 32), (48, 24), (16, 40)] + ([(33, 30)] if padded else [])
    images = [
        torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3)) for size in sizes
    ]
    want = [model(each) for each in images]
    features = [model.forward_features(each) for each in images]
    fuse(model)
    for each, logits, tokens in zip(images, want, features, strict=True):
        near(model(each), logits)
        near(model.forward_features(each), tokens)
    model.set_input_size(img_size=(48, 48))
    big = torch.randn(2, 3, 48, 48)
    near(model(big), unfuse(model)(big))


@torch.no_grad()
def test_another_size_is_set_on_a_fused_model():
    model = make("deit")
    fuse(model)
    model.set_input_size(img_size=(48, 32))
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(3))
    got = model(images)
    near(got, unfuse(model)(images))
    fuse(model)
    with pytest.raises(AssertionError, match="Input height"):
        model(IMAGES)


naflexvit = pytest.importorskip("timm.models.naflexvit", reason="this timm has no NaFlex")


def make_naflex(**options):
    torch.manual_seed(0)
    config = naflexvit.NaFlexVitCfg(
        patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, reg_tokens=2,
        class_token=False, pos_embed_grid_size=(4, 4), **{"global_pool": "avg"} | options,
    )  # fmt: skip
    return filled(naflexvit.NaFlexVit(config, num_classes=10))


@pytest.fixture
def naflex():
    return make_naflex()


@torch.no_grad()
def test_naflex_without_padding_runs_fused(naflex, monkeypatch):
    want = naflex(IMAGES)
    report = fuse(naflex)
    assert "blocks.0" in report.fused
    assert "in batches of many sizes with use_key_only_attn_mask=True alone" in report.left[""]
    forbid_originals(monkeypatch)
    near(naflex(IMAGES), want)


@torch.no_grad()
def test_naflex_s_batches_of_many_sizes_are_as_before(naflex):
    """Padding comes as a mask, for which the original forward of a block runs."""
    batch = padded()
    want, features = naflex(batch), naflex.forward_features(**batch)
    changed = {**batch, "patches": batch["patches"].clone()}
    changed["patches"][1, 6:] = 9.0  # nobody reads what is padding
    fuse(naflex)
    near(naflex(batch), want)
    near(naflex(changed), want)
    near(naflex.forward_features(**batch), features)


def padded():
    """A batch of two images, the second of 6 patches and 6 of padding."""
    generator = torch.Generator().manual_seed(4)
    patches = torch.randn(2, 12, 192, generator=generator)
    y, x = torch.arange(12) // 4, torch.arange(12) % 4
    coordinates = torch.stack([y, x], -1).expand(2, -1, -1).contiguous()
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 6:] = False
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


@torch.no_grad()
@pytest.mark.parametrize("block", ["parts", "whole"])
@pytest.mark.parametrize("pool", ["avg", "map"])
def test_naflex_s_masks_of_keys_alone_run_fused(pool, block, monkeypatch):
    for dtype in (torch.float32, torch.float64):
        model = make_naflex(use_key_only_attn_mask=True, global_pool=pool).to(dtype)
        batch = padded()
        batch["patches"] = batch["patches"].to(dtype)
        want, features = model(batch), model.forward_features(**batch)
        fuse(model, "cpu" if dtype == torch.float32 else "auto", block=block)
        with monkeypatch.context() as patch:
            forbid_originals(patch)
            near(model(batch), want, dtype)
            near(model.forward_features(**batch), features, dtype)


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "giant", "siglip", "vitamin", "aimv2", "rms norm"])
@pytest.mark.parametrize(("dtype", "near"), [("int8", 0.05), ("fp8", 0.2)])
def test_8_bits(dtype, near, family):
    model = make(family)
    want = model(IMAGES)
    fuse(model, "reference" if dtype == "fp8" else "auto", dtype=dtype)
    error = (model(IMAGES) - want).norm() / want.norm()
    assert 0 < error < near


@torch.no_grad()
def test_parts_of_a_gated_mlp_that_differ_are_named():
    model = make("giant")
    model.blocks[0].mlp.act = torch.nn.Sigmoid()
    model.blocks[1].mlp.norm = torch.nn.BatchNorm1d(64)
    report = fuse(model)
    assert "not GELU, QuickGELU or SiLU" in report.left["blocks.0.mlp"]
    assert report.left["blocks.1.mlp"] == "norm is a BatchNorm1d"


@torch.no_grad()
def test_dropout_and_hooks_within_a_gated_mlp_run_the_original():
    model = make("giant", proj_drop_rate=0.5).train()

    def run():
        torch.manual_seed(3)
        return model(IMAGES)

    want = run()
    assert "drops 0.5 in training" in str(fuse(model))
    near(run(), want)
    seen = []
    model.eval().blocks[0].mlp.act.register_forward_hook(lambda *_: seen.append(1))
    model(IMAGES)
    assert seen == [1]
