"""fuse() changes the arithmetic's speed and nothing that a user can observe otherwise."""

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from fusing import forbid_originals
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import deit
from deit import fused_vit
from deit.fused_vit import Report, fuse, fused, unfuse
from deit.fused_vit.modules import Fused
from deit.kernels.engine import native, registry

needs_library = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)


def ours(**options):
    torch.manual_seed(0)
    return deit.create("deit_ti_distilled", img_size=32, num_classes=10, **options).eval()


def timms(name="deit_tiny_distilled_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=32, num_classes=10, **options).eval()


MODELS = {
    "ours": ours,
    "timm distilled": timms,
    "timm vit": lambda **o: timms("vit_tiny_patch16_224", **o),
    "timm deit3": lambda **o: timms("deit3_small_patch16_224", init_values=0.3, **o),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.no_grad()
def test_same_logits_and_every_block_fused(model):
    want = model(IMAGES)
    report = fuse(model)
    assert isinstance(report, Report)
    assert [f"blocks.{i}" for i in range(12)] == [n for n in report.fused if n.count(".") == 1]
    assert all(isinstance(block, Fused) for block in model.blocks)
    torch.testing.assert_close(model(IMAGES), want, atol=2e-5, rtol=1e-5)


def test_layer_scale_of_ours_is_the_operators_in_inference_and_training():
    settings = replace(deit.config("deit_ti", img_size=32, num_classes=10), layer_scale=0.3)
    torch.manual_seed(0)
    model = deit.DeiT(replace(settings, depth=3), drop_path=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.1, 0.5)
    reference = copy.deepcopy(model)
    report = fuse(model)
    assert [f"blocks.{i}" for i in range(3)] == [n for n in report.fused if n.count(".") == 1]
    assert not any("ls1" in row.name for row in report.rows)
    for mode in (True, False):
        outputs = []
        for network in (model.train(mode), reference.train(mode)):
            torch.manual_seed(1)  # stochastic depth
            outputs.append(network(IMAGES))
        torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-5)
        for output in outputs:
            output.square().sum().backward()
    for (name, ours), plain in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_the_fused_path_is_the_one_that_runs(model, monkeypatch):
    """A fused block that always fell back would pass every other test here."""
    fuse(model)
    forbid_originals(monkeypatch)
    model(IMAGES)


def test_parameters_and_state_dict_are_untouched(model):
    before = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    fuse(model)
    assert all(value is before[name] for name, value in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())


def test_unfuse_restores_every_class(model):
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    fuse(model)
    assert [type(m) for m in model.modules()] != classes
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_idempotent_and_impl_may_change(model):
    first = fuse(model)
    classes = [type(m) for m in model.modules()]
    second = fuse(model, impl="reference")
    assert [type(m) for m in model.modules()] == classes
    assert (first.fused, first.left) == (second.fused, second.left)
    assert set(second.operators.values()) == {"reference"}


def test_context_restores_what_was_there(model):
    with fused(model):
        assert isinstance(model.blocks[0], Fused)
    assert not any(isinstance(m, Fused) for m in model.modules())
    fuse(model, impl="reference")
    with pytest.raises(RuntimeError, match="inside"), fused(model):
        raise RuntimeError("inside")
    assert model.blocks[0].fused_impls["linear"] == "reference"


@torch.no_grad()
def test_deepcopy_reads_its_own_weights(model):
    """A closure patched over forward would go on reading the original's."""
    fuse(model)
    want = model(IMAGES)
    duplicate = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(duplicate(IMAGES), want)


@torch.no_grad()
def test_pickle_round_trip(model):
    fuse(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert isinstance(loaded.blocks[0], Fused)
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))


@pytest.mark.parametrize("make", [ours, timms])
@torch.no_grad()
def test_ema_of_a_fused_model_follows_it(make):
    from timm.utils import ModelEmaV3

    model = make()
    fuse(model)
    ema = ModelEmaV3(model, decay=0.0)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    ema.update(model)
    torch.testing.assert_close(ema.module(IMAGES), model(IMAGES))


def training_step(model):
    torch.manual_seed(7)  # the same stochastic depth for both
    out = model.train()(IMAGES)
    out = sum(out) if isinstance(out, tuple) else out
    model.zero_grad()
    out.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_training_gradients_and_stochastic_depth_agree(name):
    options = {"drop_path": 0.5} if name == "ours" else {"drop_path_rate": 0.5}
    model = MODELS[name](**options)
    want = training_step(model)
    fuse(model)
    for parameter, grad in training_step(model).items():
        torch.testing.assert_close(grad, want[parameter], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "where", ["blocks.3", "blocks.3.norm1", "blocks.3.attn.qkv", "blocks.3.mlp.fc1", "norm"]
)
def test_hooks_run_and_see_what_they_saw(model, where):
    seen = []
    handle = model.get_submodule(where).register_forward_hook(
        lambda module, inputs, output: seen.append(output.clone())
    )
    want = model(IMAGES)
    report = fuse(model)  # with the hook in place
    assert torch.equal(model(IMAGES), want) or (model(IMAGES) - want).abs().max() < 2e-5
    handle.remove()
    model.get_submodule(where).register_forward_hook(  # and one added later
        lambda module, inputs, output: seen.append(output.clone())
    )
    model(IMAGES)
    assert len(seen) >= 3
    torch.testing.assert_close(seen[-1], seen[0], atol=1e-4, rtol=1e-4)
    if where not in ("blocks.3", "norm"):
        assert "hook" in next(r.note for r in report.rows if r.name == "blocks.3")


@torch.no_grad()
def test_global_hooks_see_every_module():
    model = ours()
    fuse(model)
    names = set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: names.add(type(module).__name__)
    )
    try:
        model(IMAGES)
    finally:
        handle.remove()
    assert {"Linear", "FusedLayerNorm", "DropPath"} <= names


@torch.no_grad()
def test_a_layer_replaced_after_fusing_is_used():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = ours()
    fuse(model)
    before = model(IMAGES)
    old = model.blocks[0].mlp.fc1
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.blocks[0].mlp.fc1 = new
    after = model(IMAGES)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, unfuse(model)(IMAGES), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_sparse_weights_take_the_original_forward(layer, when):
    """PyTorch multiplies by pruned weights in CSR, and no kernel of ours does."""
    model = ours()
    if when == "after":
        fuse(model)
    linear = model.blocks[0].get_submodule(layer)
    pruned = linear.weight * (torch.rand_like(linear.weight) > 0.5)
    linear.weight = nn.Parameter(pruned.to_sparse_csr())
    if when == "before":
        fuse(model)
    torch.testing.assert_close(model(IMAGES), unfuse(model)(IMAGES), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "timm distilled"])
def test_fullgraph_compile(name):
    model = MODELS[name]()
    fuse(model)
    want = model(IMAGES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), want, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch's own, by forward_ad
@pytest.mark.parametrize("dual", ["images", "weights"])
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_derivatives(frozen, dual):
    """A tangent that enters by the images, or by the weights of one block among frozen ones."""
    model = ours().requires_grad_(not frozen)
    names = [n for n, _ in model.named_parameters() if n.startswith("blocks.1.")]
    weights = dict(model.named_parameters())

    def call(images, *given):
        replaced = dict(zip(names, given, strict=True))
        return torch.func.functional_call(model, weights | replaced, (images,))

    def derivative():
        primals = [IMAGES, *(weights[n].detach() for n in names)]
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            for i in range(1 if dual == "images" else len(primals)):
                if (i == 0) == (dual == "images"):
                    primals[i] = forward_ad.make_dual(primals[i], torch.ones_like(primals[i]))
            return forward_ad.unpack_dual(call(*primals)).tangent.detach()

    want = derivative()
    fuse(model)
    torch.testing.assert_close(derivative(), want, atol=2e-4 * float(want.abs().max()), rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "timm distilled"])
def test_autocast_gives_the_same_dtype_and_nearly_the_same_values(name):
    model = MODELS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(IMAGES)
        fuse(model)
        got = model(IMAGES)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_an_attention_mask_is_obeyed():
    block = timms("vit_tiny_patch16_224").blocks[0]
    x = torch.randn(2, 5, 192)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    with torch.no_grad():
        want = block(x, attn_mask=mask)
        fuse(block)
        torch.testing.assert_close(block(x, attn_mask=mask), want)
        assert (block(x) - want).abs().max() > 1e-4


def test_dropout_in_training_runs_the_original():
    model = timms("vit_tiny_patch16_224", proj_drop_rate=0.5)
    want = training_step(model)
    report = fuse(model.eval())
    for parameter, grad in training_step(model).items():
        torch.testing.assert_close(grad, want[parameter])
    assert "plain for now" not in str(report)  # fused at evaluation
    assert "drops 0.5 in training" in str(fuse(model.train()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True}, "q_norm is a"),
        ({"act_layer": "relu"}, "not GELU, QuickGELU or SiLU"),
        ({"norm_layer": "simplenorm"}, "norm1 is a"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_fused_is_left_and_named(options, reason):
    model = timms("vit_tiny_patch16_224", **options)
    want = model(IMAGES)
    report = fuse(model)
    assert "blocks.0" not in report.fused
    assert any(reason in why for why in report.left.values())
    torch.testing.assert_close(model(IMAGES), want, atol=2e-5, rtol=1e-5)


def test_a_subclass_with_its_own_forward_is_left():
    class Mine(deit.model.Mlp):
        def forward(self, x):
            return x

    block = ours().blocks[0]
    block.mlp = Mine(192, 8)
    report = fuse(block)
    assert "subclass of Mlp" in report.left["mlp"]
    assert "" not in report.fused
    assert "attn" in report.fused


def test_a_forward_set_on_an_instance_is_called():
    model = ours()
    fuse(model)
    calls = []
    for linear in (model.blocks[0].mlp.fc1, model.blocks[1].attn.proj):
        linear.forward = lambda x, plain=linear.forward: calls.append(1) or plain(x)
    model(IMAGES)
    assert len(calls) == 2
    mlp = unfuse(model).blocks[2].mlp
    mlp.forward = mlp.forward
    assert fuse(model).left["blocks.2.mlp"] == "its forward was replaced on the instance"


def test_fx_tracing_sees_the_original():
    model = ours()
    block = model.blocks[0]
    fuse(block)
    graph = torch.fx.symbolic_trace(block)
    x = torch.randn(2, 5, 192)
    torch.testing.assert_close(graph(x), block(x), atol=1e-5, rtol=1e-5)


def test_nothing_to_fuse_is_said():
    with pytest.warns(UserWarning, match="nothing in this Sequential could be fused"):
        report = fuse(nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert "Conv2d alone" in report.left["0"]


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got str"):
        fuse("deit_b")
    with pytest.raises(ValueError, match=r"impl: expected 'auto' or one of .* got 'tpu'"):
        fuse(ours(), impl="tpu")
    with pytest.raises(TypeError, match="model: expected"):
        unfuse(None)


def test_a_named_implementation_that_cannot_run_raises():
    model = ours()
    fuse(model, impl="cuda")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="impl='cuda' cannot run here"):
        model(IMAGES)


@pytest.mark.parametrize("name", deit.PUBLISHED)
def test_constructors(name):
    with torch.device("meta"):
        model = getattr(fused_vit, name)(num_classes=10, drop_path=0.1)
    settings = deit.config(name, num_classes=10)
    assert model.config == settings
    assert isinstance(model.blocks[0], Fused)
    assert settings.label in getattr(fused_vit, name).__doc__


def test_report_reads_as_a_table():
    text = str(fuse(ours()))
    assert "blocks.* (x12)" in text
    assert "runs: layer_norm on" in text


def test_ddp_trains_a_fused_model(tmp_path):
    """DDP's hooks and gradient buckets hold on to the same parameters."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = ours()
        want = training_step(model)
        fuse(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        training_step(wrapped)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, want[name], atol=1e-4, rtol=1e-4)
    finally:
        dist.destroy_process_group()


def block_calls(monkeypatch):
    """Counts the calls of the CPU's vit_block."""
    calls, kernel = [], registry.COMPILED["cpu"]["vit_block"]
    count = lambda *arguments: calls.append(1) or kernel(*arguments)
    monkeypatch.setitem(registry.COMPILED["cpu"], "vit_block", count)
    return calls


@needs_library
@pytest.mark.parametrize("block", ["auto", "whole"])
def test_on_a_cpu_blocks_run_whole_with_the_bits_of_their_parts(model, block, monkeypatch):
    fuse(model, block="parts")
    with torch.no_grad():
        want = model(IMAGES)
        report = fuse(model, block=block)
        calls = block_calls(monkeypatch)
        assert torch.equal(model(IMAGES), want)
    assert len(calls) == len(model.blocks) - 1  # the last one is for the prefix alone
    assert "whole in inference" in str(report)
    assert report.operators["vit_block"] == "cpu"


@needs_library
def test_what_no_whole_kernel_serves_runs_by_parts(model, monkeypatch):
    fuse(model)
    calls = block_calls(monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(IMAGES)  # an fp32 stream beside bf16 products
    model(IMAGES)  # gradients are wanted
    assert not calls


def test_the_reference_has_no_whole_blocks(model):
    for options in ({"impl": "reference"}, {"block": "parts"}):
        assert "vit_block" not in fuse(model, **options).operators


def test_an_unknown_form_of_block(model):
    with pytest.raises(ValueError, match=r"block: expected one of .* got 'half'"):
        fuse(model, block="half")
