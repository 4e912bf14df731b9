"""Every public operator under torch.compile, torch.export, torch.func, autocast and capture."""

import contextlib
import dataclasses
import functools
import importlib
import re
from pathlib import Path

import composition
import pytest
import schema_calls
import torch
from schema_calls import CALLS, each
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import deit.kernels
from deit.kernels import warmup
from deit.kernels.engine import dispatch, limits, native, registry

CPU = sorted(registry.KERNELS["cpu"] & set(CALLS)) if not native.why_not("cpu") else []
RUNS = [(name, "auto") for name in CALLS] + [(name, "cpu") for name in CPU]
ids = "-".join


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_compile_with_gradients(name):
    composition.compiled_is_eager(name, "auto")


def test_numbers_may_change_between_compiled_calls():
    """A schedule of the temperature: torch.compile makes the second value symbolic."""
    logits, teacher, target = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([1, 2, 3, 4])

    def call(temperature):
        loss = deit.kernels.distillation_loss
        return loss(logits, target, teacher, kind="soft", temperature=temperature, alpha=0.3)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 2.5, 3.25):
        torch.testing.assert_close(compiled(temperature), call(temperature))
    with pytest.raises(ValueError, match="temperature: expected > 0"):
        call(0.0)


@pytest.mark.parametrize(("name", "impl"), RUNS, ids=map(ids, RUNS))
def test_export_round_trip(name, impl, tmp_path):
    found = composition.exported_is_eager(name, impl, tmp_path / "program.pt2")
    kernel = dispatch.expected(name, impl, torch.device("cpu"))
    assert found == (set() if kernel == "reference" else {f"deit_{kernel}.{name}"})


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, under vmap
@pytest.mark.parametrize("name", CALLS)
def test_vmap(name):
    """vmap over a new leading axis of the first input gives what a loop over it gives."""
    run, (first, *rest) = composition.call(name, "auto")
    stacked = torch.stack([first, 2 * first, -first])
    with torch.no_grad():
        got = each(torch.vmap(lambda x: run(x, *rest))(stacked))
        want = [each(run(x, *rest)) for x in stacked]
    for index, output in enumerate(got):  # the reference under vmap, a kernel without it
        expected = torch.stack([w[index] for w in want])
        assert (output - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", CALLS)
def test_torch_func_grad(name):
    """The gradient of every differentiable input is that of autograd by the reference."""
    run, tensors = composition.call(name, "auto")
    wanted = composition.differentiable(name, tensors)

    def loss(*chosen):
        inputs = list(tensors)
        for place, tensor in zip(wanted, chosen, strict=True):
            inputs[place] = tensor
        return sum(o.square().sum() for o in each(run(*inputs)))

    got = torch.func.grad(loss, tuple(range(len(wanted))))(*(tensors[i] for i in wanted))
    leaves = [tensors[i].clone().requires_grad_() for i in wanted]
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6 * b.numel() ** 0.5


@pytest.mark.parametrize("name", [n for n in CPU if f"{n}_bwd" in registry.KERNELS["cpu"]])
def test_frozen_parts_cost_nothing(name):
    composition.frozen_parts_cost_nothing(name, "cpu")


def by_dual_numbers(function, primals, tangents):
    """What torch.func.jvp returns, by torch.autograd.forward_ad."""
    with forward_ad.dual_level():
        found = each(function(*map(forward_ad.make_dual, primals, tangents)))
        return tuple(zip(*map(forward_ad.unpack_dual, found), strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch's own, by forward_ad
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("jvp", [by_dual_numbers, torch.func.jvp])
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode(name, jvp, grad):
    """Each input has a tangent in its turn, with autograd on and off: the reference's results."""
    run, tensors = composition.call(name, "auto")
    plain, _ = composition.call(name, "reference")
    for place, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            continue

        def along(call, x, place=place):
            return call(*tensors[:place], x, *tensors[place + 1 :])

        given, tangent = tensor.clone().requires_grad_(grad), torch.randn_like(tensor)
        with torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH):
            _, found = jvp(functools.partial(along, run), (given,), (tangent,))
            _, want = jvp(functools.partial(along, plain), (given,), (tangent,))
        for a, b in zip(each(found), each(want), strict=True):
            if b is None:  # vit_block's row_stats, which the reference leaves unread
                assert a is None
                continue
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("name", CPU)
def test_a_tangent_is_refused_by_a_named_kernel(name):
    run, (first, *rest) = composition.call(name, "cpu")
    with forward_ad.dual_level():
        run(first, *rest)  # what has none is served
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(NotImplementedError, match="an input has a forward-mode tangent"):
            run(dual, *rest)


@pytest.mark.parametrize("name", CPU)
def test_a_transform_is_refused_by_a_named_kernel(name):
    run, (first, *rest) = composition.call(name, "cpu")
    with pytest.raises(NotImplementedError, match=r"a torch.func transform is active"):
        torch.vmap(lambda x: run(x, *rest))(first[None])


PRODUCTS = (
    "attention", "rotary_attention", "cross_attention", "linear", "gelu_mlp", "patch_embed",
    "vit_block",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_autocast_on_the_cpu(name, dtype):
    """Products run in the autocast dtype, into a residual of fp32; norms and losses do not."""
    run, tensors = composition.call(name, "auto")
    with torch.no_grad():
        plain = each(run(*tensors))
        with torch.autocast("cpu", dtype=dtype):
            found = each(run(*tensors))
    has_residual = "residual" in CALLS[name][1] or name == "vit_block"
    want = dtype if name in PRODUCTS and not has_residual else torch.float32
    assert [o.dtype for o in found] == [want] * len(found)
    for a, b in zip(found, plain, strict=True):
        near = 0.1 if name in PRODUCTS else 1e-6
        assert (a.float() - b).norm() <= near * b.norm()
        if name in PRODUCTS:
            assert not torch.equal(a.float(), b)


@pytest.fixture
def gpu(monkeypatch):
    """CUDA tensors without a GPU: they have shapes, dtypes and a device, and no values."""
    monkeypatch.setattr(dispatch, "environment", lambda *_: ())
    monkeypatch.setattr(limits, "capability", lambda *_: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture
def autocast_to_half():
    """torch.autocast("cuda") as on a machine with a GPU; without one it turns itself off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


KERNELS = [(name, impl) for impl in ("triton", "cuda") for name in CALLS
           if name in registry.KERNELS[impl]]  # fmt: skip
ON_CUDA = [(name, "reference") for name in CALLS] + KERNELS


@pytest.mark.parametrize(("name", "impl"), ON_CUDA, ids=map(ids, ON_CUDA))
def test_autocast_on_cuda(name, impl, gpu, autocast_to_half):
    """It is as on the CPU. CUDA's rule would return fp32 from a LayerNorm of half precision."""
    run, tensors = composition.call(name, impl)
    tensors = [t.to("cuda:1") for t in tensors]
    found = each(run(*tensors))
    has_residual = "residual" in CALLS[name][1] or name == "vit_block"
    want = torch.float16 if name in PRODUCTS and not has_residual else torch.float32
    assert [o.dtype for o in found] == [want] * len(found)
    assert all(o.device == torch.device("cuda", 1) for o in found)
    if name in ("layer_norm", "add_layer_norm"):
        for output in each(run(*(t.half() for t in tensors))):
            assert output.dtype == torch.float16


def test_warmup_makes_the_calls_that_a_capture_would(monkeypatch):
    """An operator and a module run forward and backward; no gradient is left behind."""
    seen = []
    run = deit.kernels.linear

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append("backward")
            return g

    def call(x, weight, *, scale):
        return {"out": [Watched.apply(run(x, weight)) * scale, None]}

    x, weight = torch.randn(2, 3, 8), torch.randn(4, 8, requires_grad=True)
    warmup(call, x, weight, scale=2.0)
    assert seen == ["forward", "backward"] * 3
    assert weight.grad is None
    seen.clear()
    with torch.no_grad():
        warmup(call, x, weight, scale=2.0)
    assert seen == ["forward"] * 3
    layer = torch.nn.Linear(8, 4)
    layer.register_full_backward_hook(lambda *_: seen.append("module"))
    warmup(layer, x.requires_grad_())
    assert seen[3:] == ["module"] * 3
    assert layer.weight.grad is None


def test_warmup_on_a_gpu_runs_on_a_stream_of_its_own(gpu, monkeypatch):
    """It runs on the inputs' device, after its current work, and waits until all is done."""
    log = []

    class Stream:
        def wait_stream(self, other):
            log.append(f"wait for {other}")

    class Entered:
        def __init__(self, label):
            self.label = label

        def __enter__(self):
            log.append(f"enter {self.label}")

        def __exit__(self, *_):
            log.append(f"leave {self.label}")

    monkeypatch.setattr(torch.cuda, "device", lambda device: Entered(device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Entered("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    x = torch.empty(2, 5, 192, device="cuda:1")
    warmup(lambda x: log.append("call"), x)
    assert log == [
        "enter cuda:1", "wait for current", "enter side", "call", "call", "call", "leave side",
        "synchronize", "leave cuda:1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="tensors on one device; got cuda:0, cuda:1"):
        warmup(torch.add, x, x.to("cuda:0"))
    with pytest.raises(TypeError, match="function: expected a callable; got FakeTensor"):
        warmup(x)


@pytest.fixture
def launches(gpu, monkeypatch):
    """(device that is current, kernel, what it is specialised for) of each launch; none happens."""
    from deit.kernels.device import common

    current, found = ["cuda:0"], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(str(wanted))
        yield
        current.pop()

    def record(self, kernel):
        constants = {k: v for k, v in self.arguments.items() if isinstance(v, (bool, int, str))}
        found.append((current[-1], self.kernel.__name__, constants, self.num_warps))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0, raising=False)
    monkeypatch.setattr(common, "_architecture", lambda index: 90)
    monkeypatch.setattr(common, "_multiprocessors", lambda index: 132)
    monkeypatch.setattr(common.Launch, "_call", record)
    monkeypatch.setattr(common.Launch, "run", guarded(common.Launch.run))
    return found


def guarded(run):
    """`Launch.run` with a stand-in for the kernel, which Triton would ask a driver for."""

    def stand_in(self, like):
        return run(dataclasses.replace(self, kernel=Named(self.kernel.__name__)), like)

    return stand_in


class Named:
    """Has a kernel's name and takes a grid."""

    def __init__(self, name):
        self.__name__ = name

    def __getitem__(self, grid):
        return self


@pytest.mark.parametrize("full", [True, False], ids=["full", "plain"])
@pytest.mark.parametrize("name", sorted(registry.KERNELS["triton"]))
def test_triton_launches_on_the_inputs_device(name, full, launches):
    """The current device is cuda:0, the tensors are on cuda:1; and a second call launches what
    the first did, so that a capture after `warmup` finds every kernel compiled."""
    arguments = schema_calls.arguments(name, "triton", full=full, device="cuda:1")
    host = getattr(importlib.import_module(registry.MODULES["triton"][name]), name)
    outputs = each(host(*arguments))
    assert launches
    assert {device for device, *_ in launches} == {"cuda:1"}
    assert {str(o.device) for o in outputs} == {"cuda:1"}
    first = list(launches)
    launches.clear()
    host(*arguments)
    assert launches == first


def test_no_kernel_is_launched_but_by_launch():
    """What starts a kernel any other way would not be guarded."""
    for path in Path(deit.kernels.__file__).parent.glob("*/*.py"):
        text = path.read_text()
        started = re.findall(r"_kernel\[|\.warmup\b|\.run\(\)|kernel\[", text)
        assert not started or path.name == "common.py", (path.name, started)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a capture needs a GPU")
@pytest.mark.parametrize(("name", "impl"), KERNELS, ids=map(ids, KERNELS))
def test_capture_after_warmup(name, impl):
    """A graph captured after one `warmup` and replayed on other values: a plain call's bits."""
    run, tensors = composition.call(name, impl)
    static = [t.cuda() for t in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        warmup(run, *static)
        with torch.cuda.graph(graph):
            captured = each(run(*static))
        for tensor in static:
            if tensor.is_floating_point():
                tensor.mul_(0.5)
        graph.replay()
        for a, b in zip(captured, each(run(*static)), strict=True):
            assert torch.equal(a, b)
