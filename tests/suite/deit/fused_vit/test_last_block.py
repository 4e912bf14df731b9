"""The last block for the tokens that the heads read: same logits, fewer operations, no surprise."""

import contextlib

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deit
from deit.fused_vit import fuse, fused, unfuse
from deit.fused_vit import timm as fused_timm
from deit.fused_vit.last_block import PrefixOnly

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def ours(name="deit_ti_distilled", **options):
    torch.manual_seed(0)
    return deit.create(name, img_size=32, num_classes=10, **options).eval()


def timms(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=32, num_classes=10, **options).eval()


MODELS = {
    "ours": lambda **o: ours("deit_ti", **o),
    "ours distilled": ours,
    "timm": timms,
    "timm distilled": lambda **o: timms("deit_tiny_distilled_patch16_224", **o),
    "timm registers": lambda **o: timms(reg_tokens=3, **o),
    "timm deit3": lambda **o: timms("deit3_small_patch16_224", init_values=0.3, **o),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def rows_of(model, call=None):
    """How many tokens the last block was run for: None for all of them."""
    seen = []
    last = model.blocks[-1]
    advance = last.advance

    def watch(x, **options):
        seen.append(options.get("rows"))
        return advance(x, **options)

    last.advance = watch
    try:
        with torch.no_grad():
            (call or model)(IMAGES)
    finally:
        del last.advance
    return seen


def test_same_logits_from_fewer_rows(model):
    with torch.no_grad():
        want = model(IMAGES)
        report = fuse(model)
        torch.testing.assert_close(model(IMAGES), want, atol=2e-5, rtol=1e-5)
    assert isinstance(model, PrefixOnly)
    expected = 2 if hasattr(model, "dist_token") else 1
    assert rows_of(model) == [expected]
    note = next(row.note for row in report.rows if row.name == "")
    assert f"last block for the first {expected}" in note


def test_features_keep_every_token(model):
    with torch.no_grad():
        want = model.forward_features(IMAGES)
        fuse(model)
        got = model.forward_features(IMAGES)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
    assert rows_of(model, model.forward_features) == [None]


class Nowhere(contextlib.nullcontext):
    """Replaces the counter's module tracker, whose global hooks ask for the original forward."""

    parents = ("Global",)


@pytest.mark.parametrize("name", ["deit_b", "deit_b_distilled"])
def test_operations_saved(name):
    """The keys' and values' 4 N D^2 of a block's 24 N D^2 + 4 N^2 D remain: 1/12 of 83 %."""
    with torch.device("meta"), torch.no_grad():
        model = deit.create(name).eval()
        images = torch.empty(4, 3, 224, 224)
        counts = {}
        for last_block in ("full", "auto"):
            fuse(model, impl="reference", last_block=last_block)
            counter = FlopCounterMode(display=False)
            counter.mod_tracker = Nowhere()
            with counter:
                model(images)
            counts[last_block] = counter.get_total_flops()
    assert 0.068 < 1 - counts["auto"] / counts["full"] < 0.071


def gradients(model):
    torch.manual_seed(7)
    out = model.train()(IMAGES)
    out = sum(out) if isinstance(out, tuple) else out
    model.zero_grad()
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_training_draws_the_same_numbers_and_gives_the_same_gradients(name):
    options = {"drop_path": 0.5} if name.startswith("ours") else {"drop_path_rate": 0.5}
    model = MODELS[name](**options)
    want_out, want = gradients(model)
    state = torch.get_rng_state()
    fuse(model)
    out, got = gradients(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(out, want_out, atol=1e-4, rtol=1e-4)
    for parameter, grad in got.items():
        torch.testing.assert_close(grad, want[parameter], atol=1e-4, rtol=1e-4)
    assert rows_of(model) == [2 if "distilled" in name else 1]


@pytest.mark.parametrize("name", ["ours distilled", "timm"])
@pytest.mark.parametrize("where", ["blocks", "blocks.11", "blocks.11.mlp.fc1", "norm"])
def test_a_hook_sees_every_token(name, where):
    model = MODELS[name]()
    fuse(model)
    shapes = []
    handle = model.get_submodule(where).register_forward_hook(
        lambda module, inputs, output: shapes.append(output.shape[1])
    )
    assert rows_of(model) in ([None], [])  # [] where the whole block runs unfused
    tokens = model.forward_features(IMAGES).shape[1]
    assert shapes[0] == tokens
    handle.remove()
    assert rows_of(model)[0] is not None


@pytest.mark.parametrize("name", ["ours", "timm"])
def test_hooks_that_see_no_tokens_change_nothing(name):
    model = MODELS[name]()
    fuse(model)
    seen = []
    for where in ("", "head", "blocks.3"):
        model.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    assert rows_of(model) == [1]
    assert len(seen) == 3


def test_replaced_methods_are_called():
    model = timms()
    fuse(model)
    plain = model.forward_features
    calls = []
    model.forward_features = lambda x, **options: calls.append(1) or plain(x, **options)
    assert rows_of(model) == [None]
    assert calls == [1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.reset_classifier(10, global_pool="avg"), "global_pool='avg'"),
        (lambda m: m.set_grad_checkpointing(), "gradient checkpointing is on"),
    ],
)
def test_what_timm_can_be_switched_to_is_respected(change, reason):
    model = timms()
    fuse(model)
    change(model)
    model.eval()
    with torch.no_grad():
        got = model(IMAGES)
        assert reason in model.interrupted()
        torch.testing.assert_close(got, unfuse(model)(IMAGES), atol=2e-5, rtol=1e-5)


def test_a_wrapped_last_block_runs_as_it_is():
    class Wrapped(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x)

    model = ours()
    fuse(model)
    with torch.no_grad():
        want = model(IMAGES)
        model.blocks[-1] = Wrapped(model.blocks[-1])
        torch.testing.assert_close(model(IMAGES), want, atol=2e-5, rtol=1e-5)
    assert "not fused" in model.unsupported()


def test_masks_and_tracing_take_the_original():
    model = timms()
    mask = torch.ones(5, 5).tril().bool()
    with torch.no_grad():
        want = model(IMAGES, attn_mask=mask)
        fuse(model)
        torch.testing.assert_close(model(IMAGES, attn_mask=mask), want, atol=2e-5, rtol=1e-5)
        assert (model(IMAGES) - want).abs().max() > 1e-4


def test_an_unknown_timm_is_left_alone(monkeypatch):
    monkeypatch.setattr(fused_timm, "_FEATURES_KNOWN", False)
    model = timms()
    report = fuse(model)
    assert not isinstance(model, PrefixOnly)
    assert "other steps than are known" in report.left[""]
    assert "blocks.11" in report.fused


def test_the_option():
    model = ours()
    plain = type(model)
    fuse(model, last_block="full")
    assert type(model) is plain
    assert rows_of(model) == [None]
    fuse(model)
    assert rows_of(model) == [2]
    with fused(model, last_block="full"):
        assert rows_of(model) == [None]
    assert rows_of(model) == [2]
    assert type(unfuse(model)) is plain
    with pytest.raises(ValueError, match=r"last_block: expected one of .* got 'prefix'"):
        fuse(model, last_block="prefix")


def test_bad_images_are_still_named():
    model = ours()
    fuse(model)
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, 32, 32\]"):
        model(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = ours()
    fuse(model)
    with torch.no_grad():
        want = model(IMAGES)
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(model(IMAGES).float(), want, atol=3e-2, rtol=3e-2)
        got = model.to(dtype)(IMAGES.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2)


def test_under_a_wrapper_the_inner_model_is_fused():
    inner = ours()
    model = nn.Sequential(nn.Identity(), inner)
    with torch.no_grad():
        want = model(IMAGES)
        fuse(model)
        torch.testing.assert_close(model(IMAGES), want, atol=2e-5, rtol=1e-5)
    assert isinstance(inner, PrefixOnly)
