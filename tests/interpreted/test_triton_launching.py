"""Kept calls of Triton operators: the same bits as the call, and a key for all they rest on."""

import contextlib
import dataclasses
import gc
import importlib

import launches
import pytest
import schema_calls
import torch
import triton
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import deit.kernels
from deit.kernels.device import drivers, launching, tuning
from deit.kernels.engine import dispatch, registry
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as linear_module
from deit.kernels.prove import calls

TRITON = sorted(registry.KERNELS["triton"])
LINEAR = linear_module.linear


def kept_by(name):
    """The function whose calls are kept; e4m3 keeps what follows its packing."""
    module = importlib.import_module(registry.MODULES["triton"][name])
    return getattr(module, name.removeprefix("fp8") if name.startswith("fp8") else name)


@pytest.fixture
def driver(monkeypatch):
    launching.forget()
    yield launches.installed(monkeypatch)
    launching.forget()


def moved(arguments):
    """Other tensors of the same geometry, with other values."""
    return [
        (a + torch.rand_like(a) if a.is_floating_point() else a.clone())
        if torch.is_tensor(a)
        else a
        for a in arguments
    ]


def same(found, expected):
    for a, b in zip(schema_calls.each(found), schema_calls.each(expected), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def storages(outputs):
    return {o.untyped_storage().data_ptr() for o in schema_calls.each(outputs) if o.numel()}


def test_every_operator_is_kept():
    for name in TRITON:
        assert isinstance(kept_by(name), launching.Kept), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("full", [True, False], ids=["full", "plain"])
@pytest.mark.parametrize("name", TRITON)
def test_a_repeated_call_has_the_calls_bits(name, full, dtype, driver, monkeypatch):
    """With tensors moved and values changed; outputs are new, and the first stay what they were."""
    arguments = schema_calls.arguments(name, "triton", full=full, dtype=dtype)
    others, run, kept = moved(arguments), registry.COMPILED["triton"][name], kept_by(name)
    kept.calls, driver.launched = {}, 0  # the forward of a backward has run
    first = run(*arguments)
    copies = [o.clone() for o in schema_calls.each(first)]
    assert [call is not None for call in kept.calls.values()] == [True]
    assert driver.launched == 0
    again = run(*others)
    assert driver.launched
    assert len(kept.calls) == 1
    monkeypatch.setattr(drivers, "active", lambda: None)
    same(again, run(*others))
    same(first, copies)
    assert not storages(first) & storages(again)


def geometry_inputs(dtype=torch.float32):
    x, weight, bias = (torch.randn(*s) for s in ((2, 6, 64), (32, 64), (32,)))
    return [t.to(dtype) for t in (x, weight, bias)]


def elsewhere(tensor, stride=None, offset=0):
    """The same values at other strides, or `offset` elements behind an address modulo 16."""
    shape, stride = tensor.shape, stride or tensor.stride()
    room = torch.zeros(offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
    return room.to(tensor.dtype).as_strided(shape, stride, offset).copy_(tensor)


X, WEIGHT, BIAS = geometry_inputs()
PLAIN = (X, WEIGHT, BIAS, None, None, None, None)
# What a call's key must tell from PLAIN, by what differs.
CHANGED = {
    "shape": (X[:, :5].contiguous(), *PLAIN[1:]),
    "stride": (elsewhere(X, (6 * 80, 80, 1)), *PLAIN[1:]),
    "stride of a parameter": (X, elsewhere(WEIGHT, (68, 1)), *PLAIN[2:]),
    "alignment": (elsewhere(X, offset=1), *PLAIN[1:]),
    "alignment of a parameter": (X, WEIGHT, elsewhere(BIAS, offset=1), *PLAIN[3:]),
    "another alignment": (X, WEIGHT, elsewhere(BIAS, offset=2), *PLAIN[3:]),
    "dtype": (*geometry_inputs(torch.float16), *PLAIN[3:]),
    "dtype of one": (*PLAIN[:4], torch.randn(2, 6, 32, dtype=torch.float64), None, None),
    "an argument left out": (X, WEIGHT, None, *PLAIN[3:]),
    "another given": (*PLAIN[:4], torch.randn(2, 6, 32), None, None),
    "given in another place": (*PLAIN[:5], torch.randn(32), None),
    "a value": (*PLAIN[:3], "gelu", None, None, None),
}


def test_the_key_has_all_that_a_call_rests_on(driver, monkeypatch):
    """Each gives its own kept call, and its own bits when it is repeated after all the others."""
    calls = {"plain": PLAIN, **CHANGED}
    for count, arguments in enumerate(calls.values(), 1):
        LINEAR(*arguments)
        assert len(LINEAR.calls) == count
    found = {name: LINEAR(*arguments) for name, arguments in calls.items()}
    assert len(LINEAR.calls) == len(calls)
    assert driver.launched == len(calls)
    monkeypatch.setattr(drivers, "active", lambda: None)
    for name, arguments in calls.items():
        same(found[name], LINEAR(*arguments))


def test_the_key_has_which_gradients_are_wanted(driver):
    arguments, run = schema_calls.arguments("linear_bwd", "triton"), kept_by("linear_bwd")
    run.calls = {}
    (place,) = (i for i, value in enumerate(arguments) if type(value) is list)
    for wanted in (arguments[place], [not one for one in arguments[place]]):
        run(*arguments[:place], wanted, *arguments[place + 1 :])
    assert len(run.calls) == 2


def test_the_key_has_the_device(driver):
    allocated = launching.Kept(torch.empty_like)
    for device in ("cpu", "meta"):
        allocated(torch.empty(4, device=device))
    assert len(allocated.calls) == 2


def test_a_call_is_repeated_on_its_tensors_device(driver, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda i: contextlib.nullcontext(entered.append(i)))
    LINEAR(*PLAIN)
    LINEAR(*PLAIN)
    assert entered == []
    driver.device = 1
    LINEAR(*PLAIN)
    assert entered == [X.device.index]


def test_a_call_is_repeated_on_the_stream_that_is_current_then(driver):
    for driver.stream in (1, 2, 3):
        LINEAR(*PLAIN)
    assert driver.streams == [2, 3]


def test_torch_compiles_graph_repeats_the_kept_call(driver):
    """It is traced by the schema's fake, and runs on plain tensors."""
    public = lambda x: deit.kernels.linear(x, WEIGHT, BIAS, impl="triton")
    graph = torch.compile(public, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = [graph(X + step) for step in range(3)]
        assert (len(LINEAR.calls), driver.launched) == (1, 2)
    same(found, [LINEAR.function(X + step, *PLAIN[1:]) for step in range(3)])


def test_tuned_anew_other_configurations_run(driver, monkeypatch):
    LINEAR(*PLAIN)
    (before,) = LINEAR.calls.values()
    config = dataclasses.replace(linear_tiles.linear(90, X.dtype, 32, 64), block_m=32)
    tables = {90: tuning.Table()}
    monkeypatch.setattr(tuning, "tables", lambda: tables)
    monkeypatch.setattr(linear_tiles, "linear", lambda *_: config)
    LINEAR(*PLAIN)
    (after,) = LINEAR.calls.values()
    blocks = [call.steps[-1][0].template.count(32) for call in (before, after)]
    assert blocks[1] > blocks[0]


def test_one_tensor_given_twice_and_then_two(driver, monkeypatch):
    """Which of two aliased arguments a kernel reads is kept by the argument, not by the memory."""
    x, gamma, other = torch.randn(2, 5, 64), torch.randn(64), torch.randn(2, 5, 64)
    run = kept_by("add_layer_norm")
    run(x, x, gamma, gamma, 1e-5, None, None)
    found = run(x, other, gamma, 2 * gamma, 1e-5, None, None)
    assert driver.launched
    monkeypatch.setattr(drivers, "active", lambda: None)
    same(found, run(x, other, gamma, 2 * gamma, 1e-5, None, None))


def test_descriptors_follow_tensors_and_are_encoded_once_an_address(driver, monkeypatch):
    x, weight, bias = geometry_inputs(torch.float16)
    rest = (bias, None, None, None, None)
    LINEAR(x, weight, *rest)
    LINEAR(x, weight, *rest)
    (call,) = LINEAR.calls.values()
    descriptors = call.steps[-1][0].descriptors
    assert len(descriptors) == 3
    for _ in range(3):
        LINEAR(x, weight, *rest)
    assert [list(encoded) for *_, encoded in descriptors][:2] == [
        [x.data_ptr()],
        [weight.data_ptr()],
    ]
    other = torch.randn_like(weight)
    found = LINEAR(x, other, *rest)
    assert list(descriptors[1][-1]) == [weight.data_ptr(), other.data_ptr()]
    monkeypatch.setattr(launching, "ADDRESSES", 2)
    third = weight.clone()
    LINEAR(x, third, *rest)
    assert list(descriptors[1][-1]) == [third.data_ptr()]
    monkeypatch.setattr(drivers, "active", lambda: None)
    same(found, LINEAR(x, other, *rest))


def test_what_is_kept_is_bounded_and_holds_no_tensor(driver, monkeypatch):
    monkeypatch.setattr(launching, "CALLS", 3)
    held = []
    for rows in range(1, 6):
        shapes = ((rows, 64), (32, 64), (32,))
        x, weight, bias = (torch.randn(s, dtype=torch.float16) for s in shapes)
        for _ in range(2):
            out = LINEAR(x, weight, bias, None, None, None, None)
        held += [StorageWeakRef(t.untyped_storage()) for t in (x, weight, bias, out)]
    assert len(LINEAR.calls) == 3
    del x, weight, bias, out
    gc.collect()
    assert all(storage.expired() for storage in held)


def test_memory_goes_when_no_later_kernel_needs_it(driver):
    """The MLP's hidden layer is no longer there when the call has returned, nor held meanwhile."""
    steps = (kept_by("gelu_mlp_bwd")(*schema_calls.arguments("gelu_mlp_bwd", "triton")),)
    (call,) = kept_by("gelu_mlp_bwd").calls.values()
    released = [slot for _, slots in call.steps for slot in slots]
    assert len(released) == len(set(released))
    assert any(slots for _, slots in call.steps[:-2])
    assert not set(released) & {slot for slot, _ in call.parts}
    del steps


def test_a_call_that_does_something_else_is_not_kept(driver, monkeypatch):
    """A last axis that is not contiguous is copied, which a repeated call would not do."""
    x = torch.randn(2, 64, 5).transpose(1, 2)
    arguments = (x, WEIGHT, BIAS, None, None, None, None)
    found = [LINEAR(*arguments) for _ in range(2)]
    assert list(LINEAR.calls.values()) == [None]
    assert driver.launched == 0
    x += 1.0
    found.append(LINEAR(*arguments))
    with monkeypatch.context() as patch:
        patch.setattr(drivers, "active", lambda: None)
        same(found[-1], LINEAR(*arguments))
    outer = torch.zeros(4)
    for function in (
        torch.zeros_like,
        lambda x: torch.empty_like(x).zero_(),
        lambda x: x.view(-1),
        lambda x: outer,
        lambda x: [torch.empty_like(x)],
        lambda x: torch.empty_like(x).view(torch.int32),
    ):
        strange = launching.Kept(function)
        strange(X)
        assert list(strange.calls.values()) == [None]


def test_a_kernel_that_reads_another_tensor_is_not_kept(driver):
    """As one that was packed before: nothing says where it will be the next time."""
    hidden = torch.randn(64)
    strange = launching.Kept(lambda x: kept_by("layer_norm").function(x, hidden, hidden, 1e-5))
    strange(X)
    assert list(strange.calls.values()) == [None]


class Subclass(torch.Tensor):
    pass


def test_what_is_not_plain_runs_as_written(driver, monkeypatch):
    LINEAR(*PLAIN)
    LINEAR(*PLAIN)
    assert driver.launched == 1

    def runs_as_written(*arguments, **options):
        before = driver.launched
        same(LINEAR(*arguments, **options), LINEAR.function(*PLAIN))
        assert driver.launched == before

    runs_as_written(X.as_subclass(Subclass), *PLAIN[1:])
    runs_as_written(*PLAIN, config=linear_tiles.linear(90, X.dtype, 32, 64))
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(triton.knobs.runtime, name)
        hook.add(print)
        try:
            runs_as_written(*PLAIN)
        finally:
            hook.remove(print)
    for place, name, value in (
        (triton.knobs.runtime, "debug", True),
        (triton.knobs.runtime, "add_stages_inspection_hook", lambda *_: ("", "")),
        (triton.knobs.compilation, "instrumentation_mode", "some"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            runs_as_written(*PLAIN)
    with FlopCounterMode(display=False):
        runs_as_written(*PLAIN)
    torch.func.vmap(lambda _: runs_as_written(*PLAIN) or _)(torch.zeros(1))
    with monkeypatch.context() as patch:
        patch.setattr(driver, "allocate", lambda *_: elsewhere(torch.zeros(2, 6, 32), offset=1))
        runs_as_written(*PLAIN)
    LINEAR(*PLAIN)
    assert driver.launched == 2


class Named(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """Notes the schemas that public calls hand to PyTorch's dispatcher."""
    noted = []
    for name, overload in registry.COMPILED["triton"].items():
        watched = lambda *a, name=name, overload=overload: noted.append(name) or overload(*a)
        monkeypatch.setitem(registry.COMPILED["triton"], name, watched)
    return noted


@pytest.mark.parametrize("name", calls.operators(implementation="triton"))
def test_a_public_call_is_repeated_past_the_dispatcher(name, driver, dispatched):
    places, names = schema_calls.CALLS[name]
    run = lambda: getattr(deit.kernels, name)(*places, **names, impl="triton")
    with torch.no_grad():
        first, again = run(), run()
    assert dispatched == [name]
    assert driver.launched
    same(again, first)
    assert not storages(first) & storages(again)


def test_what_pytorch_leaves_out_of_a_call_is_in_its_key(driver, dispatched):
    """Trailing arguments at their defaults, which a kernel in Python is not handed."""
    x, w1, w2 = torch.randn(3, 64), torch.randn(128, 64), torch.randn(64, 128)
    for _ in range(2):
        deit.kernels.gelu_mlp(x, w1, None, w2, None, impl="triton")
    assert dispatched == ["gelu_mlp"]


def test_a_call_that_others_see_passes_through_the_dispatcher(driver, dispatched):
    public = lambda x=X: deit.kernels.linear(x, WEIGHT, BIAS, impl="triton")
    expected = public(), public()
    assert dispatched == ["linear"]
    with torch.profiler.profile() as profile:
        public()
    assert "deit_triton::linear" in {event.key for event in profile.key_averages()}
    with Named():
        public()
    torch.jit.trace(public, (X,), check_trace=False)
    assert dispatched == ["linear"] * 4
    with dispatch.recording() as problems:
        public()
    assert [problem.operator for problem in problems] == ["linear"]
    assert len(dispatched) == 4  # as a call by "auto", it is chosen first
    trained = public(X.clone().requires_grad_())
    assert dispatched[-1] == "linear_fwd"
    assert trained.requires_grad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="tangent"):
        public(forward_ad.make_dual(X, X))
    same(public(), expected[0])


def test_numbers_that_a_tensor_only_stands_for_are_not_read_in_place(driver, dispatched):
    """A view that PyTorch negates when it is read, and one of zeros without memory."""
    public = lambda x: deit.kernels.linear(x, WEIGHT, BIAS, impl="triton")
    for _ in range(2):
        public(X)
    for x, plain in ((torch._neg_view(X), -X), (torch._efficientzerotensor(X.shape), X * 0)):
        same(public(x), LINEAR.function(plain, *PLAIN[1:]))
    assert dispatched == ["linear"] * 3


def test_the_interpreter_and_unknown_versions_have_no_driver(monkeypatch):
    assert drivers.active() is None
    monkeypatch.setattr(triton, "__version__", "9.9.0")
    assert drivers.active.__wrapped__() is None
