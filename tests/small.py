"""Networks small enough to be loaded hundreds of times, and whole all the same."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers

import deit
from deit.model import DeiT

# Two blocks of DeiT-Ti at 64 px: every key there is, in 1 MB.
SMALL = replace(deit.config("deit_ti", img_size=64, num_classes=7), depth=2)
SMALL_DISTILLED = replace(SMALL, distilled=True)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def network(settings=SMALL, seed=0, **options):
    torch.manual_seed(seed)
    model = DeiT(settings, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def state_of(settings=SMALL, seed=0):
    return network(settings, seed).state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def hugging_face(kind, **changes):
    family = transformers.ViTConfig if kind.startswith("ViT") else transformers.DeiTConfig
    shape = {
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": 64,
        "num_labels": 7,
    }
    torch.manual_seed(1)
    model = getattr(transformers, kind)(family(**{**shape, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model, images):
    with torch.inference_mode():
        found = model(images)
    return found if isinstance(found, torch.Tensor) else found.logits
