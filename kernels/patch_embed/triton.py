"""Patch embedding as one product whose rows are gathered from the images as it needs them.

Row r of the output is a token: a prefix token, which has no patch and multiplies zeros (1 or 2
rows in 197), or a patch, whose C * P * P pixels the K loop reads where they lie. So there is no
im2col buffer and no concatenation: bias, prefix and positions are the epilogue (arXiv 2010.11929,
eq. 1). Accumulation and epilogue are fp32, rounded once.

The order of K follows the images: (c, i, j) reads runs of P pixels, and where channels are
innermost (i, j, c) reads runs of P * C; the weight, a few MB at most, is laid out to match.

Bytes: images and weight read once (but for the columns' tiles, which re-read images from L2),
tokens written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching
from deit.kernels.patch_embed import tiles as patch_embed_tiles


@launching.kept
def patch_embed(
    images: Tensor, *rest: Any, config: patch_embed_tiles.PatchEmbedConfig | None = None
) -> Tensor:
    """`deit.kernels.patch_embed` on Triton; images are read at any strides, never copied."""
    return common.written(plan(images, *rest, config=config), images)


def plan(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    pos_embed: Tensor,
    *,
    config: patch_embed_tiles.PatchEmbedConfig | None = None,
) -> tuple[Tensor, common.Launch | None]:
    """The tokens, unwritten, and the launch that writes them; None where there are none."""
    dim, tokens = weight.shape[0], pos_embed.shape[1]
    out = torch.empty((images.shape[0], tokens, dim), dtype=images.dtype, device=images.device)
    if out.numel() == 0:
        return out, None
    config = config or patch_embed_tiles.patch_embed(common.architecture(images), images.dtype, dim)
    gather = gather_arguments(images, weight)
    depth = weight[0].numel()
    arguments = {
        **gather,
        **common.contiguous(
            weight=weight.permute(0, 2, 3, 1) if gather["CHANNELS_LAST"] else weight,
            bias=bias,
            prefix=prefix if prefix.numel() else None,
            pos_embed=pos_embed,
        ),
        "out": out,
        "rows": images.shape[0] * tokens,
        "tokens": tokens,
        "prefix_tokens": prefix.shape[1],
        "width": dim,
        "DEPTH": depth,
        "PRECISION": common.precision(images.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    tiles = triton.cdiv(arguments["rows"], config.block_m) * triton.cdiv(dim, config.block_n)
    launch = common.Launch(_kernel, (tiles,), arguments, config.num_warps, config.num_stages)
    return out, launch


def gather_arguments(images: Tensor, weight: Tensor) -> dict[str, Any]:
    """Where the pixels of a patch are, for `patch_offsets` and `pixel_offsets`."""
    channels, patch_h, patch_w = weight.shape[1:]
    strides = dict(zip(("image_b", "image_c", "image_h", "image_w"), images.stride(), strict=True))
    return strides | {
        "images": images,
        "patch_columns": images.shape[3] // patch_w,
        "CHANNELS": channels,
        "PATCH_H": patch_h,
        "PATCH_W": patch_w,
        "CHANNELS_LAST": images.stride(1) == 1 and images.stride(3) == channels > 1,
    }


@triton.jit
def patch_offsets(
    image, patch, patch_columns, image_b, image_h, image_w,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
):  # fmt: skip
    """Offset of each patch's first pixel; 64 bits."""
    y = patch // patch_columns
    x = patch - y * patch_columns
    within = (y * PATCH_H).to(tl.int64) * image_h + (x * PATCH_W).to(tl.int64) * image_w
    return image.to(tl.int64) * image_b + within


@triton.jit
def pixel_offsets(
    k, image_c, image_h, image_w,
    CHANNELS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Offset within its patch of the k-th pixel, in the order that suits the images; 64 bits."""
    if CHANNELS_LAST:
        # (j, c) is one contiguous run. Told so, the compiler loads 16 bytes at a time from it.
        run = PATCH_W * CHANNELS
        at = (k // run).to(tl.int64) * image_h + k % run
    else:
        c, i, j = k // (PATCH_H * PATCH_W), k // PATCH_W % PATCH_H, k % PATCH_W
        at = c.to(tl.int64) * image_c + i.to(tl.int64) * image_h + j.to(tl.int64) * image_w
    return at


@triton.jit
def _kernel(
    images,
    weight,
    bias,
    prefix,
    pos_embed,
    out,
    rows,
    tokens,
    prefix_tokens,
    width,
    patch_columns,
    image_b,
    image_c,
    image_h,
    image_w,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The column tiles of the same patches are neighbours: their pixels come from L2.
    n_tiles = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, col < width
    image = row // tokens
    token = row - image * tokens
    is_patch = row_mask & (token >= prefix_tokens)
    patch = tl.maximum(token - prefix_tokens, 0)
    a_at = images + patch_offsets(
        image, patch, patch_columns, image_b, image_h, image_w, PATCH_H, PATCH_W
    )
    b_at = weight + col.to(tl.int64) * DEPTH
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in tl.range(0, DEPTH, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        pixel = pixel_offsets(
            k, image_c, image_h, image_w, CHANNELS, PATCH_H, PATCH_W, CHANNELS_LAST
        )
        a_mask, b_mask = is_patch[:, None], col_mask[:, None]
        if DEPTH % BLOCK_K:
            a_mask, b_mask = a_mask & (k < DEPTH)[None, :], b_mask & (k < DEPTH)[None, :]
        a = tl.load(a_at[:, None] + pixel[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_at[:, None] + k[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    mask = row_mask[:, None] & col_mask[None, :]
    at = token[:, None] * width + col[None, :]
    acc += tl.load(pos_embed + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + col, mask=col_mask, other=0.0).to(tl.float32)
        acc += tl.where(is_patch[:, None], added[None, :], 0.0)
    if prefix is not None:
        is_prefix = (token < prefix_tokens)[:, None]
        acc += tl.load(prefix + at, mask=mask & is_prefix, other=0.0).to(tl.float32)
    at = row.to(tl.int64)[:, None] * width + col[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
