"""Small models of transformers, and how their outputs are compared."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import transformers  # isort: skip  (importing the models has put another module in its place)


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SIZES = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "num_labels": 10,
}
KINDS = {
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig),
    "deit teacher": (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig),
    "vit features": (transformers.ViTModel, transformers.ViTConfig),
}


def make(kind="deit", attn="sdpa", **options):
    """A small model with no parameter at its initial zero or one."""
    model_class, config_class = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, attn_implementation=attn, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def layers(model):
    return getattr(model, model.base_model_prefix, model).layers


def close(got, want, **tolerance):
    """Two model outputs: the same fields in the same order, the same values to rounding."""
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        tolerance = tolerance or {"atol": 2e-5, "rtol": 1e-4}
        torch.testing.assert_close(got, want, **tolerance)
        return
    assert len(got) == len(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
        got, want = got.values(), want.values()
    for a, b in zip(got, want, strict=True):
        close(a, b, **tolerance)


def step(model):
    model.zero_grad()
    model(IMAGES).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
