"""Calls of the patch embedding."""

from __future__ import annotations

from deit.kernels.prove.calls import Call, Draw, Part, Size, Stated


def _patch_embed(draw: Draw, size: Size, form: str) -> Call:
    """Images of side x side patches, whatever the number of tokens."""
    prefix = size.prefix or (2 if form in ("training", "every") else 1)
    pixels, patches, dim = size.patch * size.side, size.side**2, size.dim
    inputs = {
        "images": draw.activation(size.batch, size.channels, pixels, pixels),
        "weight": draw.weight(dim, size.channels, size.patch, size.patch, seed=1),
        "bias": draw.random(dim, seed=2),
        "prefix": draw.random(1, prefix, dim, seed=3),
        "pos_embed": draw.random(1, prefix + patches, dim, seed=4),
    }
    flops = 2.0 * inputs["images"].numel() * dim  # no gradient for the images: as many again
    return Call("patch_embed", inputs, {}, tuple(inputs)[1:], (flops, flops))


CALLS = {"patch_embed": Stated(_patch_embed, (Part("patch_embed", lambda depth: 1),))}
