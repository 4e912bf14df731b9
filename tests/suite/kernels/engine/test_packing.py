"""Copies of weights are kept while the weight is what it was, and not a moment longer."""

import copy
import ctypes
import gc
import io
import os
import pickle
import threading

import pytest
import torch
from torch import nn

from deit.kernels.engine import native, packing

needs_library = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)


@pytest.fixture(autouse=True)
def empty():
    packing.forget()
    yield
    packing.forget()


class Maker:
    """Doubles a weight, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self, weight):
        self.calls += 1
        return weight * 2


@pytest.fixture
def make():
    return Maker()


def check(weight, make, calls):
    """The copy is right, and was made for the `calls`-th time at most."""
    with torch.no_grad():
        assert torch.equal(packing.packed(weight, "double", make), weight * 2)
    assert make.calls == calls


def test_made_once_and_by_key(make):
    weight = nn.Parameter(torch.randn(4, 6))
    check(weight, make, 1)
    check(weight, make, 1)
    other = Maker()
    with torch.no_grad():
        packing.packed(weight, "other", other)
    assert other.calls == 1
    check(weight, make, 1)
    assert packing.kept_bytes() == 2 * 4 * 6 * 4


def write_in_place(linear):
    with torch.no_grad():
        linear.weight.add_(1.0)


def write_a_view(linear):
    with torch.no_grad():
        linear.weight[1:3].zero_()


def write_under_inference_mode(linear):
    with torch.inference_mode():
        linear.weight.add_(1.0)


def step(linear):
    optimiser = torch.optim.AdamW(linear.parameters(), lr=0.1)
    linear(torch.randn(2, 6)).sum().backward()
    optimiser.step()


def load(linear):
    linear.load_state_dict(nn.Linear(6, 4).state_dict())


def load_by_assignment(linear):
    linear.load_state_dict(nn.Linear(6, 4).state_dict(), assign=True)


def swap_average(linear):
    average = copy.deepcopy(linear)
    with torch.no_grad():
        average.weight.mul_(0.5)
        for ours, theirs in zip(linear.parameters(), average.parameters(), strict=True):
            ours.copy_(theirs)


def swap_data(linear):
    linear.weight.data = torch.randn(4, 6)


def swap_data_at_the_same_address(linear):
    # The old memory is free when the new is asked for, and the allocator gives it out again.
    linear.weight.data = torch.empty(0)
    linear.weight.data = torch.randn(4, 6)


def to_dtype(linear):
    linear.to(torch.float64)


def to_dtype_and_back(linear):
    linear.to(torch.float16).to(torch.float32)


def replace(linear):
    linear.weight = nn.Parameter(torch.randn(4, 6))


def share_memory(linear):
    linear.share_memory()
    with torch.no_grad():
        linear.weight.add_(1.0)


@pytest.mark.parametrize(
    "change",
    [
        write_in_place,
        write_a_view,
        write_under_inference_mode,
        step,
        load,
        load_by_assignment,
        swap_average,
        swap_data,
        swap_data_at_the_same_address,
        to_dtype,
        to_dtype_and_back,
        replace,
        share_memory,
    ],
)
def test_every_change_makes_a_new_copy(change, make):
    linear = nn.Linear(6, 4)
    check(linear.weight, make, 1)
    change(linear)
    check(linear.weight, make, 2)
    check(linear.weight, make, 2)


def through_data(weight):
    weight.data.mul_(1.5)


def through_numpy(weight):
    weight.detach().numpy()[...] *= 1.5


def through_a_row(weight):
    weight.data[7] = 0.0


def through_another_tensor_of_the_memory(weight):
    torch.empty(0).set_(weight.detach().untyped_storage()).add_(1.0)


def by_a_fused_optimiser(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


def by_another_process(weight):
    child = os.fork()  # it touches the shared memory and nothing else
    if child == 0:
        for address in range(0, 4 * weight.numel(), 64):
            ctypes.c_uint32.from_address(weight.data_ptr() + address).value ^= 1 << 22
        os._exit(0)
    os.waitpid(child, 0)


@needs_library
@pytest.mark.parametrize(
    "write",
    [
        through_data,
        through_numpy,
        through_a_row,
        through_another_tensor_of_the_memory,
        by_a_fused_optimiser,
        by_another_process,
    ],
)
def test_writes_that_pytorch_does_not_count(write, make):
    flat = torch.randn(64 * 96)
    if write is by_another_process:
        flat.share_memory_()
    weight = nn.Parameter(flat.view(64, 96))
    check(weight, make, 1)
    check(weight, make, 1)
    version = weight._version
    write(weight)
    assert weight._version == version
    check(weight, make, 2)
    check(weight, make, 2)
    flat.mul_(0.5)  # the buffer behind it
    check(weight, make, 3)


@needs_library
def test_a_few_numbers_are_seen_in_their_turn(make):
    weight = nn.Parameter(torch.randn(64, 96))
    with torch.no_grad():
        packing.packed(weight, "double", make, 1)
        weight.data[5, 7] = 0.0
        for _ in range(100):
            packing.packed(weight, "double", make, 1)
    check(weight, make, 2)


def test_tensors_are_swapped(make):
    linear = nn.Linear(6, 4)
    check(linear.weight, make, 1)
    torch.utils.swap_tensors(linear.weight, nn.Parameter(torch.randn(4, 6)))
    check(linear.weight, make, 2)


def test_a_capture_makes_its_own_copy(make, monkeypatch):
    """A replayed CUDA graph reads the weight, not a copy of what it was."""
    weight = nn.Parameter(torch.randn(4, 6))
    check(weight, make, 1)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check(weight, make, 2)
    check(weight, make, 3)


def test_training_forgets(make):
    # The kernels of fused optimisers do not raise version counters. Training calls come first.
    weight = nn.Parameter(torch.randn(4, 6))
    check(weight, make, 1)
    optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
    packing.packed(weight, "double", make).sum().backward()
    optimiser.step()
    check(weight, make, 3)


def test_an_alias_with_its_own_counter_gets_its_own_copy(make):
    weight = nn.Parameter(torch.randn(4, 6))
    check(weight.data, make, 1)
    with torch.no_grad():
        weight.add_(1.0)
    check(weight.data, make, 2)


def test_views_find_their_copies_by_their_base(make):
    weight = nn.Parameter(torch.randn(4, 6))
    with torch.inference_mode():
        for _ in range(3):
            for view in (weight[:2], weight[2:], weight.T):
                assert torch.equal(packing.packed(view, "double", make), view * 2)
    assert make.calls == 3
    with torch.no_grad():
        weight[0, 0] = 5.0
    check(weight[:2], make, 4)


def test_nothing_is_kept_of_what_cannot_be_watched(make):
    with torch.inference_mode():
        weight = torch.randn(4, 6)
    check(weight, make, 1)
    check(weight, make, 2)
    parameter = nn.Parameter(torch.randn(4, 6))
    out = packing.packed(parameter, "double", make)
    out.sum().backward()  # grad mode: the copy is part of the graph
    assert torch.equal(parameter.grad, torch.full((4, 6), 2.0))
    assert packing.kept_bytes() == 0


def test_a_copy_made_under_inference_mode_serves_later_graphs(make):
    weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
    with torch.inference_mode():
        packing.packed(weight, "double", make)
    x = torch.randn(4, 6, requires_grad=True)
    (x * packing.packed(weight, "double", make)).sum().backward()
    assert make.calls == 1


def test_copies_go_with_the_weight(make):
    linear = nn.Linear(6, 4)
    check(linear.weight, make, 1)
    assert packing.kept_bytes() > 0
    del linear
    gc.collect()
    assert packing.kept_bytes() == 0
    assert not packing._kept


def test_copies_are_nobodys_state(make):
    linear = nn.Linear(6, 4)
    before = set(linear.__dict__) | set(linear.weight.__dict__)
    check(linear.weight, make, 1)
    assert set(linear.__dict__) | set(linear.weight.__dict__) == before
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    twin, restored = copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))
    check(twin.weight, make, 2)
    check(restored.weight, make, 3)


def test_threads_make_one_copy(make):
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    found = []
    start = threading.Barrier(8)

    def use():
        start.wait()
        found.append(packing.packed(weight, "double", make))

    workers = [threading.Thread(target=use) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert make.calls == 1
    assert all(value is found[0] for value in found)
