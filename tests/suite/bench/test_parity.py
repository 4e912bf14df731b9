"""Logits against timm's, transformers' and torchvision's: same weights, same images."""

from __future__ import annotations

import pytest
import torch

import deit
import parity

TINY = "deit_tiny_patch16_224"
TINY_DISTILLED = "deit_tiny_distilled_patch16_224"


def within(row):
    # Unit scale is what makes the bound mean something: logits near zero agree with anything.
    assert 0.5 < row.logit_std < 2.0, row
    assert row.delta <= parity.BOUND, row


@pytest.mark.parametrize("name", [*deit.PUBLISHED, "deit3_small_patch16_224"])
def test_logits_are_timms_plain_and_fused(name):
    for row in parity.against_timm(name):
        within(row)


@pytest.mark.parametrize("name", deit.PUBLISHED)
def test_logits_are_those_of_transformers(name):
    within(next(parity.against_transformers(name)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(TINY, None), (TINY_DISTILLED, None), (TINY_DISTILLED, "DeiTForImageClassification")],
)
def test_logits_are_those_of_transformers_from_a_saved_folder(name, kind):
    for row in parity.against_transformers(name, kind):
        within(row)


def test_logits_are_torchvisions():
    within(parity.against_torchvision("vit_b_16"))


def test_the_comparison_sees_a_wrong_epsilon():
    # transformers' 1e-12 against timm's 1e-6 is the smallest mistake that loading can make
    settings = deit.config(TINY)
    network = parity.transformers_network("ViTForImageClassification", settings)
    with torch.no_grad():  # a small input to the first LayerNorm, where eps counts
        for parameter in network.vit.embeddings.parameters():
            parameter.mul_(1e-2)
    images = parity.images_for(settings)
    with torch.inference_mode():
        theirs = network(images).logits
    right = deit.load(network.state_dict())
    wrong = deit.load(network.state_dict(), eps=1e-6)
    assert parity.compare("", "", theirs, right, images).delta <= parity.BOUND
    assert parity.compare("", "", theirs, wrong, images).delta > 10 * parity.BOUND


def test_the_comparison_sees_heads_joined_the_other_way():
    import timm

    network = parity.build(lambda: timm.create_model(TINY_DISTILLED))
    ours = deit.load(network.state_dict(), test_head="softmax-sum")
    images = parity.images_for(ours.config)
    with torch.inference_mode():
        theirs = network(images)
    assert parity.compare("", "", theirs, ours, images).delta > 100 * parity.BOUND
