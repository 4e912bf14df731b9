"""Hugging Face's ViT with its sdpa attention, eager, on the same weights."""

from __future__ import annotations

import re

from torch import Tensor, nn

from deit.layouts import LAYOUTS
from peers.peer import Built, Peer, Problem


def _theirs(module: nn.Module, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names: the rules that read their checkpoints, backwards."""
    rules = next(layout.rules for layout in LAYOUTS if layout.name == "Hugging Face")
    assert rules is not None
    state = {}
    for key in module.state_dict():
        matches = ((re.fullmatch(pattern, key), name) for pattern, name in rules)
        name = next(match.expand(name) for match, name in matches if match)
        name, _, part = name.partition("@")  # "...qkv.weight@0/3": the first of three stacked
        state[key] = ours[name].chunk(3)[int(part[0])] if part else ours[name]
    return state


def _build(problem: Problem) -> Built:
    import transformers

    config = problem.config
    if config is None or config.distilled:
        raise ValueError("network: expected a DeiT with one head: theirs joins two otherwise")
    settings = transformers.ViTConfig(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_ratio * config.embed_dim,
        image_size=config.img_size,
        num_labels=config.num_classes,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    theirs = transformers.ViTForImageClassification(settings)
    theirs.load_state_dict(_theirs(theirs, problem.module.state_dict()), assign=True)
    theirs.eval()
    about = f"transformers {transformers.__version__}, ViTForImageClassification, sdpa, eager"
    return Built(lambda images: theirs(images).logits, about)


PEERS = (
    Peer("transformers", "transformers eager", _build, ("transformers",),
         "pip install transformers"),
)  # fmt: skip
