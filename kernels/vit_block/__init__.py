"""One pre-norm transformer block in inference, fused across its operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deit.kernels.attention import TRITON_HEAD_DIMS, attention
from deit.kernels.engine import autocast, dispatch, limits, validate
from deit.kernels.engine.derivatives import has_tangent, needs_gradient
from deit.kernels.engine.operator import Operator, register
from deit.kernels.gelu_mlp import gelu_mlp
from deit.kernels.layer_norm import layer_norm
from deit.kernels.linear import check_activation, linear
from deit.kernels.linear.row_stats import row_stats_shape
from deit.kernels.vit_block import reference
from deit.kernels.vit_block import schema as schema
from deit.kernels.vit_block.arguments import BlockArguments


def vit_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    gamma1: Tensor | None = None,
    gamma2: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_stats: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """s = x + gamma1 * proj(attention(qkv(LN(x)))); y = s + gamma2 * fc2(act(fc1(LN(s)))).

    The block of arXiv 2010.11929, eq. (2) and (3), with LayerScale. Blocks chain by handing on the
    statistics that the next one's first LayerNorm needs:

        for block in blocks:
            x, row_stats = vit_block(x, *block, heads, row_stats=row_stats)

    For inference: the kernels have no gradient. Where one is wanted, "auto" runs the reference,
    which differentiates, and a kernel asked for by name refuses.

    Args:
        x: [B, N, D], the residual stream, in the weights' dtype or fp32.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: [D], in x's dtype or fp32.
        qkv_weight: [3 * D, D], qkv_bias: [3 * D]; proj_weight: [D, D], proj_bias: [D];
            w1: [M, D], b1: [M]; w2: [D, M], b2: [D]. One dtype, that of the products; under
            autocast they are cast to its dtype. Every bias may be None.
        num_heads: H; D must be a multiple of it.
        scale: factor on the scores; None for (D / H) ** -0.5.
        eps: of both LayerNorms.
        activation: act: "gelu" (exact, by erf), "gelu_tanh", "quick_gelu" or "silu", as for
            `linear`.
        gamma1, gamma2: [D], LayerScale (arXiv 2103.17239), in the weights' dtype or fp32, or
            None for 1.
        key_bias: [B, N], as for `attention`.
        row_stats: what the block that returned x returned beside it, or None. Not checked
            against x, and unread by the reference.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        y [B, N, D] in x's dtype, and its row statistics [B, N, 2, parts] in fp32 (fp64 for
        fp64): for every 64 columns the mean and the sum of squares about it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    validate.tensor("x", x, rank=3)
    validate.rows("qkv_weight", qkv_weight)
    hidden = validate.rows("w1", w1)
    validate.present(
        norm1_weight=norm1_weight, proj_weight=proj_weight, norm2_weight=norm2_weight, w2=w2
    )
    qkv_weight, qkv_bias, proj_weight, proj_bias, w1, b1, w2, b2 = autocast.cast(
        qkv_weight, qkv_bias, proj_weight, proj_bias, w1, b1, w2, b2
    )
    _check_stream(x, qkv_weight, row_stats, num_heads, eps)
    dim = x.shape[-1]
    validate.parameters(
        qkv_weight,
        ("qkv_weight", qkv_weight, (3 * dim, dim)),
        ("qkv_bias", qkv_bias, (3 * dim,)),
        ("proj_weight", proj_weight, (dim, dim)),
        ("proj_bias", proj_bias, (dim,)),
        ("w1", w1, (hidden, dim)),
        ("b1", b1, (hidden,)),
        ("w2", w2, (dim, hidden)),
        ("b2", b2, (dim,)),
    )
    if gamma1 is not None or gamma2 is not None or key_bias is not None:
        validate.parameters(
            qkv_weight,
            ("gamma1", gamma1, (dim,)),
            ("gamma2", gamma2, (dim,)),
            ("key_bias", key_bias, x.shape[:2]),
            fp32_allowed=True,
        )
    validate.parameters(
        x,
        ("norm1_weight", norm1_weight, (dim,)),
        ("norm2_weight", norm2_weight, (dim,)),
        fp32_allowed=True,
    )
    validate.parameters(norm1_weight, ("norm1_bias", norm1_bias, (dim,)))
    validate.parameters(norm2_weight, ("norm2_bias", norm2_bias, (dim,)))
    scale = (dim // num_heads) ** -0.5 if scale is None else float(scale)
    named = None
    if activation != "gelu":
        check_activation(activation)
        named = activation
    arguments = BlockArguments(
        x, row_stats, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
        gamma1, norm2_weight, norm2_bias, w1, b1, w2, b2, gamma2, key_bias, num_heads, scale,
        float(eps), named,
    )  # fmt: skip
    return dispatch.run(_VIT_BLOCK, arguments, impl)


def vit_blocks(x: Tensor, blocks: Sequence[Mapping[str, Any]]) -> Tensor:
    """`vit_block` after `vit_block`, each given the row statistics of the one before.

    All are validated, and their implementations chosen, before the first one runs.

    Args:
        x: [B, N, D], as for `vit_block`.
        blocks: the other arguments of each `vit_block` by name, without row_stats.

    Returns:
        y [B, N, D] of the last one; x itself where there are none.

    Raises:
        As `vit_block` does, before anything has run.
    """
    calls, differentiated = [], False
    for block in blocks:
        given = dict(block)
        impl = given.pop("impl", "auto")
        arguments = _VIT_BLOCK.prepare(x, **given)
        calls.append((arguments, impl, dispatch.choose(_VIT_BLOCK, arguments, impl)))
        differentiated |= needs_gradient(arguments) or has_tangent(arguments)
    row_stats = None
    for (_, _, *others), impl, name in calls:
        arguments = (x, row_stats, *others)
        if differentiated:  # in one block, and so in all that follow it
            name = dispatch.choose(_VIT_BLOCK, arguments, impl)
        x, row_stats = dispatch.run_chosen(_VIT_BLOCK, arguments, name)
    return x


def served(x: Tensor, qkv_weight: Tensor, proportions: Callable[[], tuple[int, int]]) -> bool:
    """Whether "auto" runs a kernel for `vit_block` in inference on this stream and weight, one
    that is faster than the block's parts.

    proportions: the MLP's hidden channels and the heads, asked for where they decide.
    """
    products = autocast.dtype_of(x) or qkv_weight.dtype

    def sizes() -> tuple[Any, ...]:
        hidden, heads = proportions()
        return qkv_weight.shape[1], hidden, heads, products

    kernels = dispatch.ahead(_VIT_BLOCK, x, sizes)
    if not kernels == ("cpu",):  # noqa: SIM201 - torch 2.11's Dynamo has no `!=` for tuples
        return bool(kernels)
    return (
        x.dtype == products
        and x.dtype in limits.KERNEL_DTYPES
        and not limits.product_limits("cpu", x)
        and not dispatch.environment("cpu", "cpu", None)
    )


def _check_stream(
    x: Tensor, like: Tensor, row_stats: Tensor | None, num_heads: int, eps: float
) -> None:
    """x against the products' dtype and device, and what belongs to x."""
    validate.heads("x", x, num_heads)
    if x.dtype not in (like.dtype, torch.float32):
        raise TypeError(f"x: expected {like.dtype}, as qkv_weight's, or fp32; got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"qkv_weight: expected on {x.device}, as the input; got {like.device}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0; got {eps}")
    if row_stats is not None:
        validate.tensor("row_stats", row_stats)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if row_stats.dtype != wide:
            raise TypeError(f"row_stats: expected {wide}; got {row_stats.dtype}")
        expected = ("row_stats", row_stats, row_stats_shape(x.shape))
        validate.parameters(x, expected, fp32_allowed=True)


def _limits(implementation: str, *arguments: Any) -> list[str]:
    block = BlockArguments(*arguments)
    dtype, weights = block.qkv_weight.dtype, (block.proj_weight, block.w1, block.w2)
    found = limits.product_limits(implementation, block.qkv_weight, *weights)
    if implementation == "cpu":
        if block.x.numel() == 0:
            found.append("an empty axis")
        if block.x.dtype != dtype:
            found.append(f"a stream in {block.x.dtype} beside products in {dtype}")
    head_dim = block.x.shape[-1] // block.num_heads
    if implementation == "triton" and head_dim not in TRITON_HEAD_DIMS:
        found.append(f"head dimension {head_dim} (served: {TRITON_HEAD_DIMS})")
    if dtype not in limits.KERNEL_DTYPES:
        found += limits.unserved(block.qkv_weight)
    return found


def _sizes(*arguments: Any) -> tuple[Any, ...]:
    block = BlockArguments(*arguments)
    hidden, width = block.w1.shape
    return width, hidden, block.num_heads, block.qkv_weight.dtype


def by_parts(*arguments: Any) -> Tensor:
    """The block's output by the other operators, as `fuse` runs it where it is not whole."""
    b = BlockArguments(*arguments)
    normed = layer_norm(b.x, b.norm1_weight, b.norm1_bias, eps=b.eps)
    qkv = linear(normed.to(b.qkv_weight.dtype), b.qkv_weight, b.qkv_bias)
    mixed = attention(qkv, b.num_heads, scale=b.scale, key_bias=b.key_bias)
    s = linear(mixed, b.proj_weight, b.proj_bias, residual=b.x, gamma=b.gamma1)
    normed = layer_norm(s, b.norm2_weight, b.norm2_bias, eps=b.eps).to(b.w1.dtype)
    mlp, activation = (b.w1, b.b1, b.w2, b.b2), b.activation or "gelu"
    return gelu_mlp(normed, *mlp, activation=activation, residual=s, gamma=b.gamma2)


_VIT_BLOCK = register(
    Operator(
        vit_block,
        reference.vit_block,
        _limits,
        constants={1: "row_stats"},
        sizes=_sizes,
        by_tokens=True,
        rival=by_parts,
    )
)
