"""fuse(model, dtype="int8"): what runs in int8, what stays, and that nothing else changes."""

import copy

import pytest
import torch

import deit
from deit.fused_vit import fuse, fused, unfuse
from deit.kernels.engine import dispatch, native

pytestmark = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)
CONFIG = deit.Config("small", embed_dim=64, num_heads=1, depth=3, img_size=32, num_classes=10)


def ours():
    torch.manual_seed(0)
    return deit.model.DeiT(CONFIG).eval()


def from_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, embed_dim=64, num_heads=1, depth=3, num_classes=10, init_values=0.5
    ).eval()


def from_torchvision():
    models = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 16, 3, 1, 64, 256, num_classes=10).eval()
    torch.nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def from_huggingface():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=256,
            image_size=32,
        )
    ).eval()  # fmt: skip


BUILDERS = {f.__name__: f for f in (ours, from_timm, from_torchvision, from_huggingface)}


def logits(model, images):
    out = model(images)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def ran(call):
    """The operators that ran in `call`, watched."""
    seen, choose = set(), dispatch.choose

    def watch(operator, arguments, impl):
        name = choose(operator, arguments, impl)
        seen.add((operator.name, name))
        return name

    dispatch.choose = watch
    try:
        call()
    finally:
        dispatch.choose = choose
    return seen


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", BUILDERS)
def test_every_library_runs_in_int8_and_comes_back(build, images):
    model = BUILDERS[build]()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        expected = logits(model, images)
        report = fuse(model, dtype="int8")
        seen = ran(lambda: logits(model, images))
        out = logits(model, images)
    assert ("int8_vit_block", "cpu") in seen
    assert not {name for name, _ in seen} & {"linear", "gelu_mlp", "vit_block"}
    assert report.operators["int8_vit_block"] == "cpu"
    assert "fc2 in int8" in str(report)
    error = (out - expected).norm() / expected.norm()
    assert 1e-6 < error < 0.03  # close, and not the fp32 path in disguise
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    unfuse(model)
    with torch.inference_mode():
        assert torch.equal(logits(model, images), expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_by_parts_when_asked(build, images):
    model = BUILDERS[build]()
    with torch.inference_mode():
        fuse(model, dtype="int8", block="whole")
        whole = logits(model, images)
        report = fuse(model, dtype="int8", block="parts")
        seen = {name for name, _ in ran(lambda: logits(model, images))}
        parts = logits(model, images)
    assert {"int8_linear", "int8_gelu_mlp", "attention"} <= seen
    assert "int8_vit_block" not in seen
    assert "int8_vit_block" not in report.operators
    if native.cpu_isa() == "avx512_bf16":  # the block's attention is in bf16, and integers flip
        assert 0 < (parts - whole).norm() < 0.015 * whole.norm()
    else:
        assert torch.equal(parts, whole)


def test_it_is_never_chosen_unasked(images):
    model = ours()
    report = fuse(model)
    with torch.inference_mode():
        seen = ran(lambda: model(images))
    assert not any(name.startswith("int8") for name, _ in seen)
    assert not any(name.startswith("int8") for name in report.operators)
    fuse(model, dtype="int8")
    with torch.inference_mode():
        assert any(name.startswith("int8") for name, _ in ran(lambda: model(images)))
    fuse(model)  # and back
    with torch.inference_mode():
        assert not any(name.startswith("int8") for name, _ in ran(lambda: model(images)))


def test_the_last_block_for_the_rows_that_are_read(images):
    model = ours()
    with torch.inference_mode():
        with fused(model, dtype="int8", block="parts", last_block="full"):
            full = model(images)
        with fused(model, dtype="int8", block="parts"):
            short = model(images)
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-5)


def test_training_is_fp32_and_a_gradient_in_eval_is_refused(images):
    model = ours()
    fuse(model, dtype="int8")
    with pytest.raises(NotImplementedError, match="inference_mode"):
        model(images)
    model.train()
    seen = ran(lambda: model(images).sum().backward())
    assert not any(name.startswith("int8") for name, _ in seen)
    assert all(p.grad is not None for p in model.parameters())


def test_a_changed_weight_is_seen(images):
    model = ours()
    fuse(model, dtype="int8")
    other = ours()
    for parameter in other.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    with torch.inference_mode():
        model(images)
    model.load_state_dict(other.state_dict())
    fuse(other, dtype="int8")
    with torch.inference_mode():
        assert torch.equal(model(images), other(images))


def test_copies(images):
    model = ours()
    fuse(model, dtype="int8")
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_bad_input(images):
    with pytest.raises(ValueError, match="dtype: expected None or one of int8, fp8; got 'int4'"):
        fuse(ours(), dtype="int4")
    with pytest.raises(ValueError, match=r"fp32 parameters on a CPU; cls_token is torch.bfloat16"):
        fuse(ours().bfloat16(), dtype="int8")
    model = ours()
    fuse(model, dtype="int8")
    model.bfloat16()
    with torch.inference_mode(), pytest.raises(NotImplementedError, match="fp32 tokens on a CPU"):
        model(images.bfloat16())


def test_export_holds_the_operators(images):
    model = ours()
    fuse(model, dtype="int8")
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        expected = model(images)
        assert torch.equal(program.module()(images), expected)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"deit_cpu.int8_vit_block.default", "deit_cpu.int8_gelu_mlp.default"} <= targets


def test_compile(images):
    model = ours()
    fuse(model, dtype="int8")
    with torch.no_grad():
        expected = model(images)
        out = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
