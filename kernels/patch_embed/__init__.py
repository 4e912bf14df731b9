"""Images to tokens: patches projected, prefix tokens prepended, positions added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import autocast, dispatch, limits, validate
from deit.kernels.engine.derivatives import gradients, once_differentiable
from deit.kernels.engine.operator import Operator, register
from deit.kernels.engine.registry import COMPILED
from deit.kernels.patch_embed import reference
from deit.kernels.patch_embed import schema as schema


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    pos_embed: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """concat(prefix, patches @ weightT + bias) + pos_embed (arXiv 2010.11929, eq. 1).

    Args:
        images: [B, C, H, W], H and W multiples of the patch size, at any strides. Only the
            reference has a gradient for them.
        weight: [D, C, P, P], the patch projection as a convolution holds it; bias: [D] or None.
        prefix: [1, T, D], the class token, then the distillation token where there is one.
        pos_embed: [1, T + H * W / P**2, D].
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, T + H * W / P**2, D] in images' dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    validate.tensor("images", images, rank=4)
    validate.tensor("weight", weight, rank=4)
    validate.tensor("prefix", prefix, rank=3)
    images, weight, bias, prefix, pos_embed = autocast.cast(images, weight, bias, prefix, pos_embed)
    (_, channels, height, width), (dim, _, *patch) = images.shape, weight.shape
    if 0 in patch:
        raise ValueError(f"weight: expected a patch of 1 x 1 or more; got {tuple(weight.shape)}")
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"images: expected height and width multiples of the patch {tuple(patch)}; "
            f"got {height} x {width}"
        )
    prefix_tokens = prefix.shape[1]
    tokens = prefix_tokens + (height // patch[0]) * (width // patch[1])
    validate.parameters(
        images,
        ("weight", weight, (dim, channels, *patch)),
        ("bias", bias, (dim,)),
        ("prefix", prefix, (1, prefix_tokens, dim)),
        ("pos_embed", pos_embed, (1, tokens, dim)),
    )
    return dispatch.run(_PATCH_EMBED, (images, weight, bias, prefix, pos_embed), impl)


class _PatchEmbed(torch.autograd.Function):
    """Differentiates by an implementation's `patch_embed_bwd`; images get no gradient."""

    @staticmethod
    def forward(ctx: Any, implementation: str, *arguments: Any) -> Tensor:
        images, weight, _, prefix, _ = arguments
        ctx.implementation, ctx.prefix_tokens = implementation, prefix.shape[1]
        ctx.save_for_backward(images if ctx.needs_input_grad[2] else None, weight)
        ctx.set_materialize_grads(False)
        return COMPILED[implementation]["patch_embed"](*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        kernel = COMPILED[ctx.implementation]["patch_embed_bwd"]
        saved = (*ctx.saved_tensors, ctx.prefix_tokens)
        return tuple(gradients(ctx, lambda wanted: kernel(dout, *saved, wanted), (2, 3, 4, 5)))


def _train(implementation: str, *arguments: Any) -> Tensor:
    return _PatchEmbed.apply(implementation, *arguments)


def _limits(implementation: str, images: Tensor, weight: Tensor, *_: Any) -> list[str]:
    return limits.product_limits(implementation, images, weight.flatten(1))


def _sizes(images: object, weight: Tensor, *_: object) -> tuple[int, ...]:
    return tuple(weight.shape)


_PATCH_EMBED = register(
    Operator(
        patch_embed,
        reference.patch_embed,
        _limits,
        _train,
        constants={0: "images"},
        sizes=_sizes,
    )
)
