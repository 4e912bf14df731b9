"""The operators as PyTorch sees them: schemas, fakes, tracing, autograd, odd memory, devices."""

import pytest
import schema_calls
import torch
from schema_calls import CALLS
from torch.nn.attention import SDPBackend, sdpa_kernel

import deit
import deit.kernels
from deit.fused_vit import fuse, register_hf
from deit.kernels.engine import dispatch, native, registry
from deit.kernels.engine.operator import OPERATORS, operator_names
from deit.kernels.prove import oracle, reference

CPU = sorted(registry.KERNELS["cpu"] & set(CALLS)) if not native.why_not("cpu") else []
needs_cpu = pytest.mark.skipif(not CPU, reason=f"{native.why_not('cpu')}")
TRAINED = sorted(name for name in CALLS if f"{name}_bwd" in registry.FAKES)


def public(name):
    return getattr(deit.kernels, name)


def prepared(name, change=lambda tensor: tensor):
    """The schema's arguments of one call with every optional set, tensors changed and detached."""
    args, kwargs = CALLS[name]
    arguments = OPERATORS[name].prepare(*args, **kwargs)
    return tuple(
        change(a.detach().clone()) if isinstance(a, torch.Tensor) else a for a in arguments
    )


def each(value):
    return value if isinstance(value, tuple) else (value,)


def refuses(name, dtype):
    """Whether the C++ kernel of a schema is not for a dtype, on any processor."""
    operator = OPERATORS[name.removesuffix("_fwd").removesuffix("_bwd")]
    why_not = operator.limits("cpu", *schema_calls.forward(operator.name, dtype=dtype))
    return any(reason.startswith("dtype") for reason in why_not)


# test_int8.py has those of 8-bit integers.
FORWARD = operator_names(eight_bits=False)
NAMES = {f"{name}{way}" for name in FORWARD for way in ("", "_fwd", "_bwd")}
CPU_NAMES = sorted(registry.KERNELS["cpu"] & NAMES)
OPCHECKS = [
    (name, dtype)
    for name in CPU_NAMES
    for dtype in (torch.float32, torch.bfloat16)
    if not refuses(name, dtype)
]


@needs_cpu
@pytest.mark.parametrize(("name", "dtype"), OPCHECKS if CPU else [], ids=str)
@pytest.mark.parametrize("full", [True, False], ids=["full", "plain"])
def test_opcheck(name, full, dtype):
    """The forward and the training schemas pass with every optional set, and with none."""
    arguments = schema_calls.arguments(name, "cpu", full=full, dtype=dtype)
    checks = torch.library.opcheck(registry.COMPILED["cpu"][name], arguments)
    assert set(checks.values()) == {"SUCCESS"}


# Ways in which equal values lie in memory.
LAYOUTS = {
    "expanded": lambda t: t[:1].expand(3, *t.shape[1:]),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
    "last axis strided": lambda t: torch.stack([t, t], dim=-1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "empty": lambda t: t[:0],
}


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CPU)
def test_any_memory_layout_gives_the_same_values(name, layout):
    """Aliased and expanded inputs are read, never written."""
    batch = prepared(name)[0].shape[0]

    def arranged(tensor):
        if tensor.shape[0] != batch:
            return LAYOUTS["last axis strided"](tensor)  # a parameter
        if tensor.dim() == 1:
            return LAYOUTS[layout](tensor) if layout in ("expanded", "empty") else tensor
        return LAYOUTS[layout](tensor)

    generator = torch.Generator().manual_seed(0)

    def drawn(tensor):
        return tensor if tensor.dim() == 1 else torch.randn(tensor.shape, generator=generator)

    draws = [prepared(name, lambda tensor: arranged(drawn(tensor))) for _ in range(8)]
    tensors = [a for draw in draws for a in draw if isinstance(a, torch.Tensor)]
    before = [a.clone() for a in tensors]
    if name == "vit_block":  # six operators in a row, each held to the rule by itself
        for draw in draws:
            packed = (a.contiguous() if isinstance(a, torch.Tensor) else a for a in draw)
            want = registry.COMPILED["cpu"][name](*packed)
            assert all(map(torch.equal, registry.COMPILED["cpu"][name](*draw), want))
        assert all(map(torch.equal, tensors, before))
        return

    def of_packed(*arguments):  # PyTorch's own attention misreads an overlapping mask
        return getattr(reference, name)(
            *(a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments)
        )

    oracle.check_draws(registry.COMPILED["cpu"][name], of_packed, draws, name=name)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def tensor_positions(name):
    args, kwargs = CALLS[name]
    named = [*range(1, len(args)), *kwargs]
    given = [*args[1:], *kwargs.values()]
    return [
        (name, key)
        for key, value in zip(named, given, strict=True)
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize(
    ("name", "position"), [pair for name in CALLS for pair in tensor_positions(name)]
)
def test_inputs_on_two_devices_are_refused(name, position):
    args, kwargs = list(CALLS[name][0]), dict(CALLS[name][1])
    where = args if isinstance(position, int) else kwargs
    where[position] = where[position].to("meta")
    with pytest.raises(ValueError, match="on cpu"):
        public(name)(*args, **kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_the_meta_device(name):
    args, kwargs = CALLS[name]
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    got, want = public(name)(*meta, **options), public(name)(*args, **kwargs)
    for a, b in zip(each(got), each(want), strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)
    with pytest.raises(NotImplementedError, match=r"these are on meta|it has no"):
        public(name)(*meta, **options, impl="cpu")


@needs_cpu
@pytest.mark.parametrize("name", CPU)
def test_a_forward_only_kernel_refuses_to_train(name, monkeypatch):
    monkeypatch.setitem(registry.KERNELS, "cpu", frozenset(CPU))
    args, kwargs = CALLS[name]
    x = args[0].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="the kernel is forward-only"):
        public(name)(x, *args[1:], **kwargs, impl="cpu")
    with torch.no_grad():
        public(name)(x, *args[1:], **kwargs, impl="cpu")


@pytest.fixture
def throwaway(monkeypatch):
    """An implementation with every kernel, each of the right shapes and of no meaning.

    What surrounds a kernel (saved tensors, the order and the shapes of gradients, what is refused)
    can so be tested for every operator, whichever kernels are built here.
    """
    names = frozenset(registry.FAKES)

    def kernel(name):
        def run(*arguments):
            return torch.utils._pytree.tree_map(torch.ones_like, registry.FAKES[name](*arguments))

        return run

    monkeypatch.setitem(registry.KERNELS, "cpu", names)
    monkeypatch.setitem(registry.COMPILED, "cpu", {name: kernel(name) for name in names})
    monkeypatch.setattr(dispatch, "environment", lambda *_: ())


def trained(name):
    """The call's tensors that a kernel has gradients for, requiring them."""
    operator = OPERATORS[name]
    arguments = list(prepared(name))
    leaves = []
    for position, value in enumerate(arguments):
        if not isinstance(value, torch.Tensor) or position in operator.constants:
            continue
        if value.is_floating_point():
            leaves.append(value.requires_grad_())
    return operator, arguments, leaves


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_a_compiled_kernel_have_their_inputs_shapes(name, throwaway):
    operator, arguments, leaves = trained(name)
    out = each(dispatch.run(operator, tuple(arguments), "cpu"))
    grads = torch.autograd.grad(sum(t.sum() for t in out), leaves)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in leaves]


@pytest.mark.parametrize("name", TRAINED)
def test_second_derivatives_of_a_compiled_kernel_are_refused(name, throwaway):
    operator, arguments, leaves = trained(name)
    out = each(dispatch.run(operator, tuple(arguments), "cpu"))
    grads = torch.autograd.grad(sum(t.square().sum() for t in out), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("name", TRAINED)
def test_second_derivatives_exist_by_the_reference(name):
    operator, arguments, leaves = trained(name)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's own fused attention has first derivatives only
        out = each(dispatch.run(operator, tuple(arguments), "reference"))
    loss = sum(t.square().sum() for t in out)
    (first,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaves[0])
    assert second.isfinite().all()
    assert second.abs().max() > 0


@pytest.mark.parametrize("name", [n for n in TRAINED if OPERATORS[n].constants], ids=lambda n: n)
def test_an_input_without_a_gradient_kernel_is_named(name, throwaway):
    operator = OPERATORS[name]
    for position, argument in operator.constants.items():
        arguments = list(prepared(name))
        if not arguments[position].is_floating_point():
            continue
        arguments[position].requires_grad_()
        with pytest.raises(NotImplementedError, match=f"{argument} requires grad"):
            dispatch.run(operator, tuple(arguments), "cpu")


def ours():
    model = deit.create("deit_ti_distilled", img_size=32, num_classes=10)
    model.blocks = model.blocks[:2]  # quicker to trace
    return model


def timms():
    import timm

    return timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=10, depth=2)


def huggingfaces():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    # transformers' own "sdpa", while exporting, writes out a mask even where nothing is hidden.
    register_hf()
    config = transformers.DeiTConfig(
        image_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=10,
        attn_implementation="deit_fused",
    )
    return transformers.DeiTForImageClassification(config)


def torchvisions():
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 16, 2, 2, 64, 128, num_classes=10)


MODELS = {"ours": ours, "timm": timms, "hugging face": huggingfaces, "torchvision": torchvisions}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(output):
    return output.logits if hasattr(output, "logits") else output


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_fullgraph_compile_of_fused_inference(model):
    with torch.no_grad():
        want = logits(model(IMAGES))
        fuse(model)
        got = logits(torch.compile(model, fullgraph=True, backend="aot_eager")(IMAGES))
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


def gradients(model, call):
    model.zero_grad()
    torch.manual_seed(3)
    out = logits(call(IMAGES))
    sum(t.square().sum() for t in each(out)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["ours", "hugging face"])
def test_fullgraph_compile_of_a_fused_training_step(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    want = gradients(model, model)
    fuse(model)
    got = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert list(got) == list(want)
    for parameter, grad in got.items():
        torch.testing.assert_close(grad, want[parameter], atol=1e-4, rtol=1e-3)


def operators_in(program):
    return {
        str(node.target).removesuffix(".default")
        for node in program.graph.nodes
        if str(node.target).startswith("deit_")
    }


def test_export_round_trip(model, tmp_path):
    """A graph exported under no_grad holds the kernels that this process would run."""
    with torch.no_grad():
        fuse(model)
        want = logits(model(IMAGES))
        program = torch.export.export(model, (IMAGES,))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(logits(loaded(IMAGES)), want, atol=5e-5, rtol=1e-4)
    if CPU:
        found = operators_in(program)
        assert "deit_cpu.layer_norm" in found
        assert found & {"deit_cpu.vit_block", "deit_cpu.vit_block_thirds"}


def test_export_with_gradients_holds_pytorch_s_operators():
    """Parameters require grad and grad is on: the forward-only kernels must not be captured."""
    model = ours().eval()
    fuse(model)
    program = torch.export.export(model, (IMAGES,))
    if not any(name.endswith("_bwd") for name in registry.KERNELS["cpu"]):
        assert operators_in(program) == set()
    torch.testing.assert_close(program.module()(IMAGES), model(IMAGES), atol=5e-5, rtol=1e-4)


def test_export_with_a_dynamic_batch():
    model = ours().eval()
    fuse(model)
    with torch.no_grad():
        batch = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = torch.export.export(model, (IMAGES,), dynamic_shapes=batch).module()
        more = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(program(more), model(more), atol=5e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, under vmap
def test_per_sample_gradients_of_a_fused_model():
    """vmap over grad: the kernels have no batching rule and must step aside."""
    model = ours().eval()
    fuse(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, IMAGES)
    for index in range(2):
        model.zero_grad()
        model(IMAGES[index : index + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name][index], parameter.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_autocast_is_the_eager_one(dtype):
    model = ours().eval()
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        want, got = model(IMAGES), compiled(IMAGES)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_functions_take_their_context_in_the_forward():
    """Beside a setup_context PyTorch binds every call's arguments by inspect.signature: 55 us."""
    functions = [
        function
        for function in torch.autograd.Function.__subclasses__()
        if function.__module__.startswith("deit.kernels")
    ]
    assert len(functions) >= 7
    assert not [each.__name__ for each in functions if "setup_context" in vars(each)]
