"""Launches of the patch embedding that ship, and what of it `deit tune` measures."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deit.kernels.device import common
from deit.kernels.patch_embed import tiles as patch_embed_tiles
from deit.kernels.patch_embed import triton as patch_embed
from deit.kernels.patch_embed import triton_bwd as patch_embed_bwd
from deit.kernels.prove.launches import TOKENS, Kernel, Shipped, empty, first
from deit.kernels.prove.tuned import Terms, Tuned


def _patch_embed(shipped: Shipped) -> common.Launch:
    dtype, dim = shipped.torch_dtype, shipped.size
    images = empty(shipped.batch, 3, 224, 224, dtype=dtype)
    if shipped.variant == "channels last":
        images = images.contiguous(memory_format=torch.channels_last)
    weight, bias = empty(dim, 3, 16, 16, dtype=dtype), empty(dim, dtype=dtype)
    tokens = empty(1, TOKENS, dim, dtype=dtype)
    if shipped.operator == "patch_embed":
        config = patch_embed_tiles.patch_embed(shipped.arch, dtype, dim)
        return first(patch_embed.plan(images, weight, bias, tokens[:, :1], tokens, config=config))
    dout = empty(shipped.batch, TOKENS, dim, dtype=dtype)
    if shipped.variant == "tokens":
        return patch_embed_bwd.plan_tokens(dout, weight, 1)[1][0]
    bwd_config = patch_embed_tiles.patch_embed_bwd(shipped.arch, dtype, dim)
    return patch_embed_bwd.plan_weight(dout, images, weight, 1, config=bwd_config)[1][0]


# A patch is no rectangle that a descriptor could describe.
KERNELS = {
    "patch_embed": Kernel(
        ("channels first", "channels last"),
        patch_embed_tiles.patch_embed,
        _patch_embed,
        descriptors=False,
    ),
    "patch_embed_bwd": Kernel(
        ("channels first", "channels last", "tokens"),
        patch_embed_tiles.patch_embed_bwd,
        _patch_embed,
        descriptors=False,
        without=("tokens",),
    ),
}


def tuned(at: Terms) -> Iterator[Tuned]:
    """The forward."""
    yield at.of_call("patch_embed", {"dim": at.size.dim}, patch_embed.patch_embed)
