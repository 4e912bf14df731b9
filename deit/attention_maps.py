"""Where a network's prefix tokens look, drawn over the photograph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deit.model import DeiT


@torch.no_grad()
def attention_maps(model: DeiT, images: Tensor, layer: int = -1) -> Tensor:
    """Attention of the prefix tokens to the patches in one block, by a hook on its projection.

    Args:
        model: a plain DeiT. images: [B, 3, H, W], normalised.
        layer: of `model.blocks`, negative from the end.

    Returns:
        [B, heads, prefix tokens, grid, grid], fp32; each head's weights over all tokens sum to 1,
        so over the patches to at most 1.

    Raises:
        ValueError: no such layer.
    """
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise ValueError(f"layer: expected in [{-depth}, {depth}); got {layer}")
    config, caught = model.config, []
    attention: Any = model.blocks[layer].attn
    hook = attention.qkv.register_forward_hook(lambda _, __, qkv: caught.append(qkv))
    try:
        model(images)
    finally:
        hook.remove()
    batch, tokens, _ = caught[0].shape
    shape = (batch, tokens, 3, config.num_heads, config.embed_dim // config.num_heads)
    q, k, _ = caught[0].float().view(shape).permute(2, 0, 3, 1, 4).unbind(0)
    prefix = config.prefix_tokens
    weights = (q[:, :, :prefix] @ k.transpose(-1, -2) * attention.scale).softmax(-1)
    return weights[..., prefix:].unflatten(-1, (config.grid, config.grid))


def overlay(photograph: Image.Image, heat: Tensor) -> Image.Image:
    """`heat` [grid, grid] over the photograph: dark where little, red to yellow where much."""
    size = photograph.size
    level = heat / heat.max().clamp_min(1e-12)
    level = F.interpolate(level[None, None], size=size[::-1], mode="bicubic")[0, 0].clamp(0, 1)
    grey = torch.frombuffer(bytearray(photograph.convert("L").tobytes()), dtype=torch.uint8)
    grey = grey.view(size[1], size[0]).float() / 255 * 0.6
    ramp = torch.stack([(3 * level).clamp(max=1), (2 * level - 0.6).clamp(0, 1), 0 * level], -1)
    colour = grey[..., None] * (1 - level[..., None]) + ramp * level[..., None]
    return Image.fromarray((colour * 255).round().to(torch.uint8).numpy())


def picture(photograph: Image.Image, maps: Tensor, heads: bool) -> Image.Image:
    """The photograph, and a row for each prefix token: the heads' mean, then each head if asked."""
    rows = []
    for token in maps.transpose(0, 1):  # [heads, grid, grid]
        shown = [token.mean(0), *(token if heads else ())]
        rows.append([photograph, *(overlay(photograph, heat) for heat in shown)])
    gap, (width, height) = 4, photograph.size
    sheet = Image.new(
        "RGB",
        (len(rows[0]) * (width + gap) - gap, len(rows) * (height + gap) - gap),
        (255, 255, 255),
    )
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            sheet.paste(tile, (x * (width + gap), y * (height + gap)))
    return sheet
