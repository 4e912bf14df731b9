"""Hugging Face's ViT, eager, on the same weights: its sdpa attention, and its flash ones.

The flash implementations, and all of these on CUDA, have not been run on a GPU yet.
"""

from __future__ import annotations

import functools

from peers.peer import FLASH, HALVES, Built, Peer, Problem, everywhere, on_cuda, one_headed, renamed


def _build(problem: Problem, attention: str) -> Built:
    import transformers

    config = one_headed(problem)
    if config.layer_scale is not None:
        raise ValueError("network: expected one without LayerScale: their ViT has none")
    settings = transformers.ViTConfig(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_ratio * config.embed_dim,
        image_size=config.img_size,
        num_labels=config.num_classes,
        layer_norm_eps=1e-6,
        attn_implementation=attention,
        dtype=problem.images.dtype,  # it refuses flash attention in fp32
    )
    theirs = transformers.ViTForImageClassification(settings)
    state = renamed(theirs, problem.module.state_dict(), "Hugging Face")
    theirs.load_state_dict(state, assign=True)
    theirs.eval()
    version = f"transformers {transformers.__version__}"
    about = f"{version}, ViTForImageClassification, {attention}, eager"
    return Built(lambda images: theirs(images).logits, about)


def _flash(version: int) -> Peer:
    package, install = FLASH[version]
    return on_cuda(
        f"transformers-flash{version}",
        f"transformers eager, flash {version}",
        functools.partial(_build, attention=f"flash_attention_{version}"),
        ("transformers", package),
        f"pip install transformers && {install}",
        dtypes=HALVES,
    )


_sdpa = functools.partial(_build, attention="sdpa")
PEERS = (
    everywhere("transformers", "transformers eager", _sdpa, ("transformers",)),
    *map(_flash, FLASH),
)
