"""Gradients of the patch embedding: its weight, bias, prefix tokens and positions.

dweight [D, K] = dout.T @ patches is a small matrix summed over B * L patches, so the sum is split
over programs that fill the GPU, each gathering its patches from the images as the forward does;
`partials` adds their fp32 tiles in a fixed order. The other three are sums of dout over the batch,
taken in one reading of it: dpos_embed, whose first rows are dprefix, and dbias from the same sums
before they are rounded.

Bytes: dout twice, images once a column tile (from L2 mostly), and the partial sums, 8 D K for
each split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.device import common, launching, partials
from deit.kernels.patch_embed import tiles as patch_embed_tiles
from deit.kernels.patch_embed import triton as patch_embed


@launching.kept
def patch_embed_bwd(
    dout: Tensor,
    images: Tensor | None,
    weight: Tensor,
    prefix_tokens: int,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    """(dweight, dbias, dprefix, dpos_embed), in weight's dtype; those not `wanted` are empty.

    The last three are one reading of dout, made where any of them is wanted.
    """
    dout = common.last_contiguous(dout)
    of_weight, *of_others = wanted or (True,) * 4
    dweight = weight.new_empty(0)
    launches: list[common.Launch] = []
    if of_weight:
        assert images is not None  # as the schema has it
        dweight, launches = plan_weight(dout, images, weight, prefix_tokens)
    others = (weight.new_empty(0),) * 3
    if any(of_others):
        others, more = plan_tokens(dout, weight, prefix_tokens)
        launches = launches + more
    for launch in launches:
        launch.run(dout)
    return dweight, *(t if of else t.new_empty(0) for t, of in zip(others, of_others, strict=True))


def plan_weight(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    prefix_tokens: int,
    *,
    config: patch_embed_tiles.PatchEmbedBwdConfig | None = None,
) -> tuple[Tensor, list[common.Launch]]:
    """dweight and the launches that write it."""
    dim, depth = weight.shape[0], weight[0].numel()
    dweight = weight.new_empty(weight.shape)
    patches = dout.shape[1] - prefix_tokens
    rows = dout.shape[0] * patches
    if rows == 0 or dweight.numel() == 0:
        return dweight.zero_(), []
    config = config or patch_embed_tiles.patch_embed_bwd(
        common.architecture(images), images.dtype, dim
    )
    tiles = triton.cdiv(dim, config.block_m) * triton.cdiv(depth, config.block_n)
    # As many splits as fill the GPU, but no sum shorter than four blocks.
    splits = config.programs * common.multiprocessors(images) // tiles
    splits = max(1, min(splits, rows // (4 * config.block_k)))
    span = triton.cdiv(triton.cdiv(rows, splits), config.block_k) * config.block_k
    splits = triton.cdiv(rows, span)  # none is empty
    partial = torch.empty((1, splits, dweight.numel()), dtype=torch.float32, device=images.device)
    arguments = patch_embed.gather_arguments(images, weight) | {
        "dout": dout,
        "partial": partial,
        "rows": rows,
        "span": span,
        "patches": patches,
        "prefix_tokens": prefix_tokens,
        "width": dim,
        "dout_b": dout.stride(0),
        "dout_n": dout.stride(1),
        "DEPTH": depth,
        "PRECISION": common.precision(images.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    launch = common.Launch(
        _weight_kernel, (splits * tiles,), arguments, config.num_warps, config.num_stages
    )
    return dweight, [launch, partials.plan_sum(partial, dweight)]


def plan_tokens(
    dout: Tensor, weight: Tensor, prefix_tokens: int
) -> tuple[tuple[Tensor, Tensor, Tensor], list[common.Launch]]:
    """(dbias, dprefix, dpos_embed) and the launches that write them."""
    batch, tokens, dim = dout.shape
    outputs = dbias, dprefix, dpos_embed = (
        weight.new_empty(dim),
        weight.new_empty((1, prefix_tokens, dim)),
        weight.new_empty((1, tokens, dim)),
    )
    if dout.numel() == 0:
        for out in outputs:
            out.zero_()
        return outputs, []
    sums = torch.empty((1, tokens, dim), dtype=torch.float32, device=dout.device)
    block = min(256, triton.next_power_of_2(dim))
    arguments = {
        "dout": dout,
        "sums": sums,
        "dprefix": dprefix,
        "dpos_embed": dpos_embed,
        "batch": batch,
        "tokens": tokens,
        "prefix_tokens": prefix_tokens,
        "width": dim,
        "dout_b": dout.stride(0),
        "dout_n": dout.stride(1),
        "ROWS": 4096 // block,  # 32 elements a thread of 4 warps: loads enough in flight
        "BLOCK": block,
    }
    grid = (tokens * triton.cdiv(dim, block),)
    launch = common.Launch(_tokens_kernel, grid, arguments, num_warps=4)
    if tokens == prefix_tokens:
        dbias.zero_()
        return outputs, [launch]
    return outputs, [launch, partials.plan_sum(sums[:, prefix_tokens:], dbias)]


@triton.jit
def _weight_kernel(
    dout,
    images,
    partial,
    rows,
    span,
    patches,
    prefix_tokens,
    width,
    dout_b,
    dout_n,
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
    # Programs that read the same patches are neighbours.
    n_tiles = tl.cdiv(DEPTH, BLOCK_N)
    tiles = tl.cdiv(width, BLOCK_M) * n_tiles
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    col = tile // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask, k_mask = col < width, k < DEPTH
    pixel = images + patch_embed.pixel_offsets(
        k, image_c, image_h, image_w, CHANNELS, PATCH_H, PATCH_W, CHANNELS_LAST
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, last = split * span, tl.minimum(split * span + span, rows)
    # A way around the loop would set the sums, and ptxas then await every wgmma (triton 3.6).
    tl.assume(first < last)
    for r0 in tl.range(first, last, BLOCK_K):
        row = r0 + tl.arange(0, BLOCK_K)
        row_mask = (row < rows)[:, None]
        image = row // patches
        patch = row - image * patches
        g_at = image.to(tl.int64) * dout_b + (patch + prefix_tokens).to(tl.int64) * dout_n
        g = tl.load(
            dout + g_at[:, None] + col[None, :], mask=row_mask & col_mask[None, :], other=0.0
        )
        x_at = patch_embed.patch_offsets(
            image, patch, patch_columns, image_b, image_h, image_w, PATCH_H, PATCH_W
        )
        x = tl.load(pixel[None, :] + x_at[:, None], mask=row_mask & k_mask[None, :], other=0.0)
        acc = tl.dot(g.T, x, acc, input_precision=PRECISION)

    if CHANNELS_LAST:  # from (i, j, c) back to the weight's own (c, i, j)
        k = k % CHANNELS * (PATCH_H * PATCH_W) + k // CHANNELS
    at = (split.to(tl.int64) * width + col)[:, None] * DEPTH + k[None, :]
    tl.store(partial + at, acc, mask=col_mask[:, None] & k_mask[None, :])


@triton.jit
def _tokens_kernel(
    dout,
    sums,
    dprefix,
    dpos_embed,
    batch,
    tokens,
    prefix_tokens,
    width,
    dout_b,
    dout_n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) % tokens
    col = tl.program_id(0) // tokens * BLOCK + tl.arange(0, BLOCK)
    col_mask = col < width
    source = dout + token.to(tl.int64) * dout_n + col
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for b0 in tl.range(0, batch, ROWS):
        image = b0 + tl.arange(0, ROWS)
        mask = (image < batch)[:, None] & col_mask[None, :]
        at = source[None, :] + image.to(tl.int64)[:, None] * dout_b
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0)
    at = token * width + col
    tl.store(sums + at, total, mask=col_mask)
    tl.store(dpos_embed + at, total.to(dpos_embed.dtype.element_ty), mask=col_mask)
    if token < prefix_tokens:
        tl.store(dprefix + at, total.to(dprefix.dtype.element_ty), mask=col_mask)
