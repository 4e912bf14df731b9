"""The calls of a fused model, found without its weights, are those that it makes."""

import copy
import functools

import fusing
import pytest
import torch
from fusing import FAMILIES, make
from torch import nn

from deit.fused_vit import calls, fuse
from deit.fused_vit.calls import Unknown, calls_of, image_shape, networks
from deit.kernels.engine import dispatch

SHAPE = tuple(fusing.IMAGES.shape)


def made(model, training):
    """What a real call does."""
    model.train(training)
    with dispatch.recording() as problems, torch.set_grad_enabled(training):
        model(fusing.IMAGES)
    return set(problems)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_a_real_call(family, training):
    model = make(family)
    fuse(model, block="parts")
    found = calls_of(model, SHAPE, torch.float32, training=training)
    assert len(found) == len(set(found)) > 4
    real = made(model, training)
    if family == "hugging face" and not training:  # q, k, v apart or joined, by who runs them
        assert real < set(found)
    else:
        assert real == set(found)
    assert all(problem.training is training for problem in found)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_blocks_are_among_them_with_their_parts(family, dtype):
    model = make(family)
    fuse(model, dtype=dtype)
    found = calls_of(model, SHAPE, torch.float32, training=False)
    operators = [problem.operator for problem in found]
    whole = "vit_block" if dtype is None else "int8_vit_block"
    assert made(model, training=False) <= set(found)
    assert operators[-1] == whole
    assert {"attention", "layer_norm"} <= set(operators)


def test_those_of_named_implementations_are_left_out():
    model = make("ours")
    fuse(model, impl="cpu")  # which has no kernels of some
    named = {op for op, impl in model.fused_impls.items() if impl == "cpu"}
    found = calls_of(model, SHAPE, torch.float32, training=False)
    assert named
    assert not named & {problem.operator for problem in found}


def test_autocast_is_the_one_that_is_on():
    model = make("ours")
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = calls_of(model, SHAPE, torch.float32, training=True)
    kinds = {p.arguments[0].dtype for p in found if p.operator in ("linear", "gelu_mlp")}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_users_is_touched(family, training):
    model = make(family).train(not training)
    fuse(model)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    first = next(model.parameters())
    first.register_hook(lambda *_: seen.append(2))
    before, generator = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    attributes = [dict(vars(module)) for module in model.modules()]
    assert calls_of(model, SHAPE, torch.float32, training=training)
    assert seen == []
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for module, known in zip(model.modules(), attributes, strict=True):
        assert all(vars(module)[name] is value for name, value in known.items())


def test_what_a_forward_adds_to_a_list_stays_its_own():
    class Noting(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            self.seen.append(x)
            return x

    model = Noting(make("ours"))
    model.seen = []
    fuse(model)
    assert calls_of(model, SHAPE, torch.float32, training=False)
    assert model.seen == []


def test_wrappers_and_forwards_on_instances_are_taken_off():
    model = make("ours")
    fuse(model)
    expected = set(calls_of(model, SHAPE, torch.float32, training=False))
    model.blocks[0] = torch.compile(model.blocks[0])
    block = model.blocks[1]
    block.forward = lambda x, forward=block.forward: forward(x)
    assert set(calls_of(model, SHAPE, torch.float32, training=False)) == expected


def test_a_model_that_does_not_run_says_why():
    model = make("ours")
    fuse(model)
    with pytest.raises(Unknown, match=r"ValueError.*images"):
        calls_of(model, (2, 3, 40, 40), torch.float32, training=False)
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    with everywhere, pytest.raises(Unknown, match="a hook on all modules"):
        calls_of(model, SHAPE, torch.float32, training=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_says_which_images_it_is_for(family):
    model = make(family)
    assert image_shape(model) == (3, 32, 32)
    behind = nn.Sequential(nn.Identity(), model)
    assert image_shape(behind) is None
    assert networks(behind) == [(model, (3, 32, 32))]
    assert networks(nn.Linear(3, 3)) == []


def test_fakes_take_no_memory():
    model = make("ours")
    fuse(model)
    fakes = []
    twin = calls.stripped(model, lambda value: fakes.append(value) or value)
    assert len(fakes) == len([*model.parameters(), *model.buffers()])
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert not any(a is b for a, b in zip(twin.modules(), model.modules(), strict=True))


class Remembering(nn.Module):
    """A network that keeps what it made of sizes alone outside of itself, as transformers do."""

    def __init__(self, memo):
        super().__init__()
        self.net, self.memo = make("ours"), memo

    def forward(self, images):
        return self.net(images) + self.memo(images.shape[-1], images.device)


@pytest.mark.parametrize("within", [lambda t: t, lambda t: (t, (t,))])
def test_what_the_run_left_in_a_cache_is_forgotten(within):
    memo = functools.lru_cache(lambda size, device: within(torch.full((1,), size, device=device)))
    first = lambda *of: memo(*of) if isinstance(memo(*of), torch.Tensor) else memo(*of)[0]
    model = Remembering(first)
    fuse(model)
    calls_of(model, SHAPE, torch.float32, training=False)
    assert memo.cache_info().currsize == 0
    with torch.no_grad():
        assert type(model(fusing.IMAGES)) is torch.Tensor
        assert torch.equal(model(fusing.IMAGES), model.net(fusing.IMAGES) + SHAPE[-1])
    calls_of(model, SHAPE, torch.float32, training=False)  # what others keep is left
    assert memo.cache_info().currsize == 1
