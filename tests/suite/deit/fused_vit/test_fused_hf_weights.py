"""q, k and v lie in three weights, and what is written to them by any means counts at once."""

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
    """Optimizers outside PyTorch do this: only train() and eval() tell of the change."""
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


def by_data_in_place(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def by_numpy(model):
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 1.5


def by_a_flat_buffer(model):
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    with torch.inference_mode():
        model(IMAGES)
    flat.mul_(1.5)


def by_one_number(model):
    layers(model)[0].attention.v_proj.weight.data[3, 5] += 10.0


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
    by_data_in_place,
    by_numpy,
    by_a_flat_buffer,
    by_one_number,
    by_bias_alone,
]


@pytest.mark.parametrize("block", ["auto", "parts"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_outputs_follow(change, block):
    model = make()
    fuse(model, block=block)
    with torch.inference_mode():
        before = model(IMAGES).logits
    change(model)
    images = IMAGES.to(next(model.parameters()).dtype)
    with torch.no_grad():
        got = model(images)
        assert (got.logits - before).abs().max() > 1e-3 or change is by_dtype
        close(got, unfuse(model)(images))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 6])  # operator by operator, and image by image
def test_q_k_and_v_are_read_where_they_lie(batch, dtype, monkeypatch):
    """They give the same bits as one weight does, and no weights are copied together."""
    model = make().to(dtype)
    fuse(model)
    images = IMAGES[:1].repeat(batch, 1, 1, 1).to(dtype)
    joined = []
    cat = torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda t, *a, **k: joined.append(t[0].dim()) or cat(t, *a, **k)
    )
    got = model(images).logits
    assert 2 not in joined
    monkeypatch.undo()
    projection = huggingface.FusedAttention.projection
    monkeypatch.setattr(
        huggingface.FusedAttention,
        "projection",
        lambda self: tuple(map(torch.cat, projection(self))),
    )
    assert torch.equal(model(images).logits, got)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_on_its_own(copied):
    model = make()
    names = list(model.state_dict())
    fuse(model)
    model(IMAGES)
    assert list(model.state_dict()) == names
    for parameter in model.parameters():
        parameter.mul_(1.5)
    duplicate = copied(model)
    assert isinstance(layers(duplicate)[0], Fused)
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
