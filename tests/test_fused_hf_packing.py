"""The packed weight of q, k and v: kept while they do not change, and only then."""

import copy
import pickle

import pytest
import torch
from hf import IMAGES, close, layers, make, step

from deit.fused_vit import fuse, huggingface, unfuse
from deit.fused_vit.modules import Fused


# Every way in which a weight changes between two calls in inference.
def by_optimizer(model):
    step(model)
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def by_load_state_dict(model):
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})


def by_assignment(model):
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_data(model):
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data


def behind_the_version_counter(model):
    """As optimizers outside PyTorch do: nothing but train() and eval() tells."""
    model.train()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.eval()


def behind_it_after_a_training_step(model):
    step(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def by_dtype(model):
    model.double()


def by_bias_alone(model):
    with torch.no_grad():
        layers(model)[0].attention.v_proj.bias.add_(1.0)


CHANGES = [
    by_optimizer,
    by_load_state_dict,
    by_assignment,
    by_data,
    behind_the_version_counter,
    behind_it_after_a_training_step,
    by_dtype,
    by_bias_alone,
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_packed_weight_follows(change):
    model = make()
    fuse(model)
    with torch.inference_mode():
        before = model(IMAGES).logits
    change(model)
    images = IMAGES.to(next(model.parameters()).dtype)
    with torch.no_grad():
        got = model(images)
        assert (got.logits - before).abs().max() > 1e-3 or change is by_dtype
        close(got, unfuse(model)(images))


@torch.no_grad()
def test_the_packed_weight_is_kept_and_is_no_state(monkeypatch):
    model = make()
    names = list(model.state_dict())
    packed = []
    pack = huggingface._pack
    monkeypatch.setattr(huggingface, "_pack", lambda t: packed.append(1) or pack(t))
    fuse(model)
    for _ in range(3):
        model(IMAGES)
    assert len(packed) == 2  # once a layer
    assert list(model.state_dict()) == names
    assert not any("pack" in name for name, _ in model.named_buffers())


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_starts_with_no_packed_weight(copied):
    """It would double a checkpoint of the module, and a copy's version counters start again."""
    model = make()
    fuse(model)
    model(IMAGES)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    duplicate = copied(model)
    assert isinstance(layers(duplicate)[0], Fused)
    assert layers(model)[0].attention.fused_packed.kept is not None
    assert layers(duplicate)[0].attention.fused_packed.kept is None
    close(duplicate(IMAGES), model(IMAGES))
    close(duplicate(IMAGES), unfuse(model)(IMAGES))


def test_frozen_weights_still_carry_gradients_to_the_images():
    model = make().requires_grad_(False)
    fuse(model)
    with torch.inference_mode():
        model(IMAGES)  # fills the cache
    images = IMAGES.clone().requires_grad_()
    (got,) = torch.autograd.grad(model(images).logits.square().sum(), images)
    unfuse(model)
    (want,) = torch.autograd.grad(model(images).logits.square().sum(), images)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_functional_call_uses_the_given_weights():
    model = make()
    fuse(model)
    with torch.no_grad():
        before = model(IMAGES).logits
        doubled = {name: 1.5 * p for name, p in model.named_parameters()}
        got = torch.func.functional_call(model, doubled, (IMAGES,)).logits
        torch.testing.assert_close(model(IMAGES).logits, before)
        unfuse(model)
        want = torch.func.functional_call(model, doubled, (IMAGES,)).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
