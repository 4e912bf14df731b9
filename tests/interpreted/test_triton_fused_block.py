"""fuse(model, block="whole"): the same logits, statistics handed on, the parts where they must."""

from __future__ import annotations

import pytest
import timm
import torch

import deit
from deit.fused_vit import fuse, fused, unfuse
from deit.kernels.engine import registry

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def ours(**options):
    model = deit.create("deit_ti_distilled", img_size=32, num_classes=10, **options)
    model.blocks = model.blocks[:3]
    return model


def timms(**options):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=10, depth=3, init_values=0.3, **options
    )


def torchvisions():
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 16, 3, 2, 64, 128, num_classes=10)


def huggingfaces():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.DeiTConfig(
        image_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_labels=10
    )
    return transformers.DeiTForImageClassification(config)


MODELS = {"ours": ours, "timm": timms, "torchvision": torchvisions, "hugging face": huggingfaces}


def made(name, **options):
    torch.manual_seed(0)
    model = MODELS[name](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(output):
    return output.logits if hasattr(output, "logits") else output


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of vit_block was given row statistics."""
    seen = []
    original = registry.COMPILED["triton"]["vit_block"]

    def record(x, row_stats, *others):
        seen.append(row_stats is not None)
        return original(x, row_stats, *others)

    monkeypatch.setitem(registry.COMPILED["triton"], "vit_block", record)
    return seen


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_same_logits_by_whole_blocks(name, calls):
    model = made(name)
    want = logits(model(IMAGES))
    report = fuse(model, impl="triton", block="whole")
    torch.testing.assert_close(logits(model(IMAGES)), want, atol=5e-5, rtol=1e-4)
    # The last block of our own and timm's is for the rows that are read, by its parts.
    assert calls == ([False, True] if name in ("ours", "timm") else [False] * 3)
    assert report.operators["vit_block"] == "triton"
    assert str(report).count("whole in inference") == 1


@torch.no_grad()
def test_half_precision_products_beside_an_fp32_stream(calls):
    model = made("ours")
    want = model(IMAGES)
    fuse(model, impl="triton", block="whole")
    with torch.autocast("cpu", dtype=torch.float16):
        got = model(IMAGES)
    assert calls == [False, True]
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


def test_every_token_where_features_are_asked_for(calls):
    model = made("ours")
    with torch.no_grad():
        want = model.forward_features(IMAGES)
        fuse(model, impl="triton", block="whole")
        torch.testing.assert_close(model.forward_features(IMAGES), want, atol=5e-5, rtol=1e-4)
    assert calls == [False] * 3


@pytest.mark.parametrize("where", ["blocks.1", "blocks.1.attn", "blocks.1.mlp.fc1"])
@torch.no_grad()
def test_a_hooked_block_keeps_its_hook_and_the_others_run_whole(where, calls):
    model = made("ours")
    want = model(IMAGES)
    fuse(model, impl="triton", block="whole", last_block="full")
    shapes = []
    handle = model.get_submodule(where).register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape))
    )
    torch.testing.assert_close(model(IMAGES), want, atol=5e-5, rtol=1e-4)
    assert len(shapes) == 1
    # A hook on the block itself sees a call of it, which is whole; one inside takes the original.
    assert calls == [False] * (3 if where == "blocks.1" else 2)
    handle.remove()


@torch.no_grad()
def test_statistics_stop_at_a_hook(calls):
    model = made("ours")
    fuse(model, impl="triton", block="whole")
    model.blocks[0].register_forward_hook(lambda *_: None)
    model(IMAGES)
    assert calls == [False, False]


def test_training_and_gradients_take_the_parts(calls):
    model = made("ours", drop_path=0.5)
    fuse(model, block="whole", impl="triton")
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "blocks" in name)
    with torch.no_grad():
        model.train()(IMAGES)
    assert calls == []
    model.eval().requires_grad_(False)
    model(IMAGES)
    assert calls == [False, True]


def test_fusing_again_changes_it_back(calls):
    model = made("ours")
    state = [set(vars(m)) for m in model.modules()]
    with torch.no_grad(), fused(model, "triton", block="whole"):
        model(IMAGES)
    assert calls == [False, True]
    fuse(model, impl="triton", block="whole")
    report = fuse(model, impl="triton")
    with torch.no_grad():
        model(IMAGES)
    assert calls == [False, True]
    assert "vit_block" not in report.operators
    unfuse(model)
    assert [set(vars(m)) for m in model.modules()] == state


def test_norms_of_two_eps_run_by_their_parts(calls):
    model = made("ours")
    model.blocks[0].norm2.eps = 1e-3
    report = fuse(model, impl="triton", block="whole")
    with torch.no_grad():
        model(IMAGES)
    assert calls == [False]
    assert "by its parts: its norms' eps differ, 1e-06 and 0.001" in str(report)


@torch.no_grad()
def test_compiled_and_exported():
    model = made("ours")
    fuse(model, impl="triton", block="whole")
    want = model(IMAGES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), want, atol=5e-5, rtol=1e-4)
    graph = torch.export.export(model, (IMAGES,)).graph
    names = [str(node.target) for node in graph.nodes]
    assert names.count("deit_triton.vit_block.default") == 2
