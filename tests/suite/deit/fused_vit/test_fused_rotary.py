"""fuse() on timm's Eva (EVA-02, DINOv3, RoPE ViTs, Perception Encoder)."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from fusing import IMAGES, filled, forbid_originals
from timm.models import eva

from deit.fused_vit import fuse, fused, unfuse
from deit.fused_vit.modules import Fused, original_class
from deit.kernels.engine import native

DINOV3 = {
    "rope_type": "dinov3", "rope_rotate_half": True, "use_rot_pos_emb": True, "init_values": 0.5,
    "use_abs_pos_emb": False, "num_reg_tokens": 4, "qkv_bias": False, "use_fc_norm": False,
}  # fmt: skip
ROPE = {
    "attn_type": "rope",
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "use_fc_norm": False,
}
EVA02 = {"use_rot_pos_emb": True, "swiglu_mlp": True, "ref_feat_shape": (4, 4)}
KINDS = {
    "dinov3": DINOV3,
    "dinov3, gated": DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8, "qkv_bias": True},
    "dinov3 of any size": DINOV3 | {"dynamic_img_size": True},
    "eva02": EVA02,
    "eva02, apart and normalised": EVA02 | {"qkv_fused": False, "scale_mlp": True},
    "eva02 of clip": EVA02 | {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True},
    "eva without rotation": {"qkv_bias": True, "init_values": 0.5},
    "rope": ROPE | {"init_values": 0.5, "global_pool": "token"},
    "rope with positions": ROPE | {"use_abs_pos_emb": True, "no_embed_class": True},
    "rope, mixed": ROPE | {"rope_type": "mixed"},
    "rope, q and k normalised": ROPE | {"qk_norm": True},
    "rms norms": DINOV3 | {"norm_layer": timm.layers.RmsNorm, "swiglu_mlp": True, "qk_norm": True,
                           "attn_type": "rope", "global_pool": "token"},
    "perception encoder": ROPE | {"global_pool": "map", "use_pre_transformer_norm": True,
                                  "rope_grid_indexing": "xy", "rope_grid_offset": 1.0},
}  # fmt: skip


def make(kind="dinov3", **options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = eva.Eva(**sizes, num_classes=10, mlp_ratio=2, **KINDS[kind], **options)
    return filled(model)


def everything(model, images=IMAGES):
    """Logits, features, and what both blocks give."""
    with torch.no_grad():
        final, between = model.forward_intermediates(images, return_prefix_tokens=True)
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        return [model(images), features, pooled, final, *sum(between, ())]


def same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        close = 1e-12 if ours.dtype == torch.float64 else 2e-6
        torch.testing.assert_close(ours, theirs, rtol=0, atol=close * theirs.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_same_outputs_by_the_fused_blocks(kind, monkeypatch):
    model = make(kind)
    keys = list(model.state_dict())
    wanted = everything(model), everything(model.double(), IMAGES.double())
    report = fuse(model.float())
    assert {"blocks.0", "blocks.1", "blocks.0.attn", "blocks.0.mlp"} <= set(report.fused)
    assert not any(name.startswith("blocks") for name in report.left)
    forbid_originals(monkeypatch)
    same(everything(model), wanted[0])
    same(everything(model.double(), IMAGES.double()), wanted[1])
    assert list(unfuse(model).state_dict()) == keys
    assert not any(isinstance(module, Fused) for module in model.modules())


@pytest.mark.parametrize("kind", ["dinov3, gated", "eva02 of clip", "rope, mixed"])
def test_a_training_step(kind):
    """The mixed kind learns its angles: no kernel has their gradient, so its blocks run as they
    were. Stochastic depth draws what it drew."""
    model = make(kind, drop_path_rate=0.3).train()

    def step(network):
        torch.manual_seed(1)
        loss = network(IMAGES).square().sum()
        return [loss, *torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)]

    want, twin = step(model), copy.deepcopy(model)
    fuse(twin)
    for got, expected in zip(step(twin), want, strict=True):
        if expected is not None:
            torch.testing.assert_close(
                got, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item()
            )


@pytest.mark.parametrize("kind", ["dinov3 of any size", "rope, mixed"])
def test_any_image_size(kind, monkeypatch):
    options = {} if "any" in kind else {"dynamic_img_size": True}
    model, images = make(kind, **options), torch.randn(1, 3, 40, 64)
    want = everything(model, images)
    fuse(model)
    forbid_originals(monkeypatch)
    same(everything(model, images), want)


def ran_unfused(model, monkeypatch, call):
    """The fused modules of a model that ran their originals in `call`, by class."""
    seen, runs_fused = [], Fused.runs_fused

    def asked(self, x):
        found = runs_fused(self, x)
        if not found:
            seen.append(original_class(self).__name__)
        return found

    monkeypatch.setattr(Fused, "runs_fused", asked)
    with torch.no_grad():
        return call(), set(seen)


def test_dropped_patches_have_tables_of_their_own():
    """Tables then have a batch axis, which only the original takes."""
    for kind in ("dinov3", "rope, mixed"):
        model = make(kind, patch_drop_rate=0.5).train()
        twin = copy.deepcopy(model)
        fuse(twin)
        found = []
        for network in (model, twin):
            torch.manual_seed(2)
            with torch.no_grad():
                found.append(network(IMAGES))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_masks_run_the_original():
    model, mask = make(), torch.ones(21, 21, dtype=torch.bool).tril()
    with torch.no_grad():
        want = [model(IMAGES, attn_mask=mask), model(IMAGES, is_causal=True)]
        fuse(model)
        same([model(IMAGES, attn_mask=mask), model(IMAGES, is_causal=True)], want)
        assert (model(IMAGES) - want[0]).abs().max() > 1e-3


def test_dropout_and_hooks_run_the_original(monkeypatch):
    model = make("rope, q and k normalised")
    fuse(model)
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    attn.attn_drop.p = 0.5
    attn.train()
    _, seen = ran_unfused(model, monkeypatch, lambda: model(IMAGES))
    assert seen == {"EvaBlock", "AttentionRope"}
    attn.eval()
    for part in (attn, attn.q_norm, attn.k_norm, attn.qkv, mlp, mlp.act, model.blocks[0].norm1):
        calls = []
        handle = part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        _, seen = ran_unfused(model, monkeypatch, lambda: model(IMAGES))
        handle.remove()
        assert "EvaBlock" in seen
        assert calls == [1]


def test_replaced_parts_run_the_original():
    model = make("eva02")
    fuse(model)
    model.blocks[0].mlp.act = torch.nn.ReLU()
    model.blocks[1].attn.qkv = torch.nn.Sequential(model.blocks[1].attn.qkv)
    plain = copy.deepcopy(model)
    unfuse(plain)
    model.blocks[1].attn.qkv = model.blocks[1].attn.qkv[0]
    plain.blocks[1].attn.qkv = plain.blocks[1].attn.qkv[0]
    same(everything(model), everything(plain))


def test_what_cannot_be_fused_says_why():
    left = fuse(make("eva without rotation", use_post_norm=True)).left
    assert left.keys() & {"blocks.0.attn", "blocks.0.mlp"} == set()
    for options, part, reason in (
        ({"gated_attn": True}, "attn", "it gates its output"),
        ({"qkv_fused": False, "num_kv_heads": 1}, "attn", "it groups its queries"),
    ):
        block = eva.EvaBlock(64, 2, attn_type="rope", **options)
        assert fuse(torch.nn.Sequential(block)).left[f"0.{part}"] == reason


def test_eight_bits_leave_these_blocks_in_their_dtype():
    model = make()
    want = everything(model)
    report = fuse(model, dtype="int8")
    assert "int8 does not know rotary positions" in str(report)
    same(everything(model), want)


@pytest.mark.skipif(bool(native.why_not("cpu")), reason="no C++ library")
@pytest.mark.parametrize("batch", [2, 8])  # operator by operator, and image by image
@pytest.mark.parametrize("kind", ["dinov3", "rope, mixed", "rope, apart", "eva without rotation"])
def test_whole_blocks_have_the_bits_of_their_parts(kind, batch, threads):
    threads(1)
    options = {"qkv_fused": False} if "apart" in kind else {}
    model = make(kind.replace("apart", "mixed"), **options)
    images = torch.randn(batch, 3, 32, 32)
    want = everything(model, images)
    assert "vit_block" not in fuse(model, "cpu", block="parts").operators
    parts = everything(model, images)
    report = fuse(model, "cpu", block="whole")
    assert "whole in inference" in str(report)
    assert report.operators["vit_block"] == "cpu"
    found = everything(model, images)
    assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))
    same(found, want)


def test_whole_blocks_are_not_asked_of_kernels_that_do_not_rotate():
    for kind, reason in (
        ("eva02", "its MLP is gated"),
        ("rope, q and k normalised", "a whole block knows no norms within attention"),
    ):
        assert f"by its parts: {reason}" in str(fuse(make(kind)))
    # The device that tests pretend to run on has a table that says nothing of rotary_attention.
    report = fuse(make())
    assert "no rotary_attention kernel is measured on this device" in str(report)
    assert report.evidence["rotary_attention"].source.startswith("not measured")
    report = fuse(make(), "triton", block="whole")
    assert "the CPU's whole block alone knows rotary positions" in str(report)


def test_autocast_and_half_precision():
    model = make("dinov3, gated")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(IMAGES)
        with fused(model):
            found = model(IMAGES)
    assert (found - want).norm() < 0.03 * want.norm()
    model.bfloat16()
    with torch.no_grad():
        want = model(IMAGES.bfloat16()).float()
        with fused(model):
            found = model(IMAGES.bfloat16()).float()
    assert (found - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("kind", ["dinov3", "eva02, apart and normalised", "rope, mixed"])
def test_compiled(kind):
    torch._dynamo.reset()
    model = make(kind)
    with torch.no_grad():
        want = model(IMAGES)
        fuse(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        same([compiled(IMAGES)], [want])


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_small_patch16_rope_224"]
)
def test_published_architectures_on_the_meta_device(name):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    assert "blocks.0" in fuse(model).fused
