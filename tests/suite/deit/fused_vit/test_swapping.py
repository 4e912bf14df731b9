"""What else changes or reads a fused module's class: parametrizations, subclasses, tracers."""

import copy
import io
import warnings

import pytest
import torch
from fusing import BLOCKS, FAMILIES, IMAGES, blocks, logits, make, same
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import feature_extraction

from deit.fused_vit import fuse, fused, unfuse
from deit.fused_vit.modules import Fused


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


PARAMETERS = {
    "ours": ["blocks.0.norm1.weight", "blocks.1.attn.qkv.weight", "norm.bias", "cls_token"],
    "timm": ["blocks.0.norm2.weight", "blocks.1.mlp.fc1.bias", "norm.weight", "pos_embed"],
    "torchvision": ["encoder.layers.encoder_layer_0.ln_1.weight", "encoder.ln.weight"],
    "hugging face": ["vit.layers.0.layernorm_after.bias", "vit.layers.0.attention.k_proj.weight"],
}
CASES = [(family, name) for family, names in PARAMETERS.items() for name in names]


def halve(model, name):
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, attribute, Half())
    return lambda: parametrize.remove_parametrizations(module, attribute)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_parametrised_while_fused(family, name):
    model, plain = make(family), make(family)
    fuse(model)
    undo = [halve(m, name) for m in (model, plain)]
    want = logits(plain)
    same(logits(model), want)
    same(logits(copy.deepcopy(model)), want)
    unfuse(model)
    assert not any(isinstance(m, Fused) for m in model.modules())
    same(logits(model), want)
    fuse(model)
    same(logits(model), want)
    for take_off in undo:
        take_off()
    same(logits(model), logits(plain))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_parametrised_within_the_context(family, name):
    model, plain = make(family), make(family)
    with fused(model):
        undo = [halve(m, name) for m in (model, plain)]
    assert not any(isinstance(m, Fused) for m in model.modules())
    same(logits(model), logits(plain))
    fuse(model)
    with fused(model, impl="reference"):
        same(logits(model), logits(plain))
    for take_off in undo:
        take_off()
    same(logits(model), logits(plain))


class Zero(nn.Module):
    def forward(self, x, *args, **kwargs):
        return torch.zeros_like(x)


class ZeroPair(Zero):
    def forward(self, x, *args, **kwargs):
        return torch.zeros_like(x), None


PARTS = {
    "ours": ("attn", "mlp", "norm1", "ls1"),
    "timm": ("attn", "mlp", "norm1", "ls1", "drop_path1"),
    "torchvision": ("mlp", "ln_1", "dropout"),
    "hugging face": ("attention", "mlp", "layernorm_before", "dropout"),
}


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize(
    ("family", "part"), [(family, part) for family, parts in PARTS.items() for part in parts]
)
def test_fused_again_with_another_part(family, part, index):
    model, plain = make(family), make(family)
    fuse(model)
    for m in (model, plain):
        kind = ZeroPair if part == "attention" else Zero
        identity = part in ("ls1", "drop_path1", "dropout")
        setattr(blocks(m, family)[index], part, nn.Identity() if identity else kind())
    want = logits(plain)
    same(logits(model), want)
    report = fuse(model)
    same(logits(model), want)
    assert "runs:" in str(report)
    if not identity:
        name = next(n for n, m in model.named_modules() if m is blocks(model, family)[index])
        assert part in report.left[name]
    with fused(model, impl="reference"):
        same(logits(model), want)
    same(logits(model), want)
    same(logits(unfuse(model)), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_again_with_another_block(family):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model = make(family)
    want = logits(model)
    fuse(model)
    holder = model.get_submodule(BLOCKS[family])
    name = list(holder._modules)[-1]
    holder._modules[name] = Wrapped(holder._modules[name])
    same(logits(model), want)
    fuse(model)
    same(logits(model), want)
    with fused(model):
        same(logits(model), want)
    same(logits(unfuse(model)), want)


class MergingAttention(Attention):
    """Merges tokens as arXiv 2210.09461's patch of timm does: it puts a class on modules."""

    def forward(self, x):
        return super().forward(x), x.mean(-1)


class MergingBlock(Block):
    def forward(self, x):
        attended, metric = self.attn(self.norm1(x))
        x = x + attended
        x = x[:, 1:] + 0.1 * metric[:, 1:, None]
        return x + self.mlp(self.norm2(x))


def merge_tokens(model):
    class Merging(type(model)):
        def forward(self, *args, **kwargs):
            self.merged = 0
            return super().forward(*args, **kwargs)

    model.__class__ = Merging
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = MergingBlock
        elif isinstance(module, Attention):
            module.__class__ = MergingAttention


def test_tokens_merged_after_fusing_and_before():
    plain = make("timm")
    merge_tokens(plain)
    want = logits(plain)
    model = make("timm")
    fuse(model)
    merge_tokens(model)
    same(logits(model), want)
    fuse(model)
    same(logits(model), want)
    unfuse(model)
    assert not any(isinstance(m, Fused) for m in model.modules())
    assert isinstance(model, VisionTransformer)
    same(logits(model), want)
    fuse(plain)
    same(logits(plain), want)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("family", ["timm", "torchvision"])  # whose plain models can be scripted
def test_scripted_it_is_the_original(family):
    model = make(family)
    want = logits(model)
    fuse(model)
    script = torch.jit.script(model)
    same(logits(script), want)
    assert script.state_dict().keys() == model.state_dict().keys()
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    buffer.seek(0)
    same(logits(torch.jit.load(buffer)), want)
    if family == "timm":  # a root that is fused hands out a copy
        assert all(isinstance(block, Fused) for block in blocks(model, family))
    fuse(model)
    same(logits(model), want)


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_traced_by_fx_it_has_the_nodes_of_the_original(family):
    model, plain = make(family), make(family)
    fuse(model)
    names = feature_extraction.get_graph_node_names(plain)
    assert feature_extraction.get_graph_node_names(model) == names
    chosen = {name: name for name in names[1][-12:]}
    found, want = (
        feature_extraction.create_feature_extractor(m, chosen)(IMAGES) for m in (model, plain)
    )
    for name in chosen:
        same(found[name], want[name])


def test_functions_that_a_library_keeps_from_fx_are_kept_from_it():
    from timm.models import create_feature_extractor  # by timm's registry of leaves

    model = make("timm", dynamic_img_size=True)  # its size is a question for a function of timm's
    with torch.no_grad():
        want = create_feature_extractor(copy.deepcopy(model), ["blocks.0.add_1"])(IMAGES)
        fuse(model)
        same(create_feature_extractor(model, ["blocks.0.add_1"])(IMAGES), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dynamo", [False, True])
def test_exported_to_onnx(family, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            out = self.model(images)
            return getattr(out, "logits", out)

    model = Logits(make(family))
    want = logits(model)
    fuse(model)
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (IMAGES,), path, dynamo=dynamo, input_names=["images"], verbose=False
        )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("name", ["norm1", "mlp"])
def test_nested_tensors_run_the_original(layout, name):
    part = getattr(blocks(make("timm"), "timm")[0], name)
    parts = [torch.randn(n, 64) for n in (3, 7, 1)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with torch.no_grad():
        want = part(nested).unbind()
        fuse(part)
        got = part(nested).unbind()
    for ours, theirs in zip(got, want, strict=True):
        same(ours, theirs)
