"""Heads whose width together is not the stream's: cut so from the start, or pruned since."""

import copy

import pytest
import torch
from fusing import IMAGES, filled, forbid_originals, logits, make, same
from timm.models.vision_transformer import Attention
from torch import nn

from deit.fused_vit import fuse, unfuse

OPTIONS = [{}, {"block": "parts"}, {"block": "whole"}, {"impl": "reference"}]


def timms(width):
    model = make("timm")
    for block in model.blocks:
        block.attn = Attention(64, 2, attn_head_dim=width, qkv_bias=True)
    return filled(model)


MODELS = {
    "timm narrower": lambda: timms(16),
    "timm wider": lambda: timms(64),
    "hugging face narrower": lambda: make("hugging face", head_dim=16),
    "hugging face wider": lambda: make("hugging face", head_dim=64),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_same_logits(name, options, monkeypatch):
    model = MODELS[name]()
    want = logits(model)
    report = fuse(model, **options)
    forbid_originals(monkeypatch)
    same(logits(model), want)
    if options.get("block") != "parts" and options.get("impl") is None:
        assert "wide together, its tokens 64" in str(report)


@pytest.mark.parametrize("name", MODELS)
def test_int8_and_bf16(name):
    model = MODELS[name]()
    want = logits(model)
    coarse = logits(copy.deepcopy(model).bfloat16(), IMAGES.bfloat16()).float()
    half = copy.deepcopy(model).bfloat16()
    fuse(half)
    allowed = 2 * (coarse - want).abs().max() + 0.02 * want.abs().max()
    assert (logits(half, IMAGES.bfloat16()).float() - want).abs().max() <= allowed
    fuse(model, dtype="int8")
    assert (logits(model) - want).abs().max() < 0.2 * want.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_same_gradients(name):
    model = MODELS[name]().train()
    twin = copy.deepcopy(model)
    fuse(model)
    for each in (model, twin):
        out = each(IMAGES)
        getattr(out, "logits", out).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)


def cut(linear, rows=None, columns=None):
    """A linear layer of some of the rows or columns of another."""
    weight, bias = linear.weight.data, linear.bias.data
    if rows is not None:
        weight, bias = weight[rows], bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data, made.bias.data = weight.clone(), bias.clone()
    return made


def prune_timm(attention):
    """Keep one head of two, as structured pruning does."""
    width = attention.head_dim
    rows = [part * 2 * width + channel for part in range(3) for channel in range(width)]
    attention.qkv = cut(attention.qkv, rows)
    attention.proj = cut(attention.proj, columns=range(width))
    attention.num_heads, attention.attn_dim = 1, width


def prune_hugging_face(attention):
    """The same for Hugging Face, where the number of heads follows from the widths."""
    width = attention.head_dim
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, cut(getattr(attention, name), range(width)))
    attention.o_proj = cut(attention.o_proj, columns=range(width))


PRUNED = {
    "timm": lambda model, index: prune_timm(model.blocks[index].attn),
    "hugging face": lambda model, index: prune_hugging_face(model.vit.layers[index].attention),
}


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("order", ["pruned first", "fused first"])
@pytest.mark.parametrize("family", PRUNED)
def test_heads_pruned(family, order, index, dtype, monkeypatch):
    model = make(family)
    if order == "fused first":
        fuse(model, dtype=dtype)
        logits(model)
    PRUNED[family](model, index)
    if order == "pruned first":
        fuse(model, dtype=dtype)
    want = logits(unfuse(copy.deepcopy(model)))
    forbid_originals(monkeypatch)
    if dtype is None:
        same(logits(model), want)
    else:
        assert (logits(model) - want).abs().max() < 0.2 * want.abs().max()


@pytest.mark.parametrize("family", ["timm", "ours"])
def test_what_the_original_refuses_is_refused(family):
    model = make(family)
    fuse(model)
    attention = model.blocks[0].attn
    attention.qkv = cut(attention.qkv, range(96))  # heads as before
    with pytest.raises(RuntimeError, match=r"invalid for input of size|shape"):
        logits(model)
