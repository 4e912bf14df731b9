"""Linear layers and MLPs in 8-bit integers, for inference, where asked for by name.

Weights are quantised once, symmetrically with a scale an output channel, and kept while they do not
change. Activations are quantised as they pass, with a scale and a zero point a token. Nothing is
calibrated. Sums are exact in int32. LayerNorm, bias, GELU, residual and LayerScale are fp32, in the
same visit of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import dispatch, eight_bits, validate
from deit.kernels.engine.operator import Operator, register
from deit.kernels.gelu_mlp import gelu_mlp
from deit.kernels.int8 import reference
from deit.kernels.int8 import schema as schema
from deit.kernels.layer_norm import layer_norm
from deit.kernels.linear import linear
from deit.kernels.vit_block import by_parts, served, vit_block
from deit.kernels.vit_block.arguments import BlockArguments


def int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: eight_bits.Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """residual + gamma * act(LN(x) @ weight.T + bias), the product in 8-bit integers.

    Args:
        x: [..., K], floating point, K at most 65536.
        weight: [M, K] and bias: [M] or None, in x's dtype. The weight's int8 form is kept between
            calls and made anew when the weight changes (`deit.kernels.engine.packing`).
        norm: LayerNorm's (weight [K], bias [K] or None, eps) to apply to x first, or None.
        activation: None, or "gelu" (exact to 3e-6), which takes neither residual nor gamma.
        residual: [..., M] in x's dtype, or None.
        gamma: [M], LayerScale (arXiv 2103.17239), in x's dtype, or None for 1.
        impl: "auto", "reference" or "cpu" (fp32 only).

    Returns:
        [..., M] in x's dtype. The same bits for any number of threads. A row with NaN or an
        infinity is NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: a gradient is wanted; the implementation named by `impl` cannot run.
    """
    arguments = eight_bits.linear_arguments(
        "int8_linear", x, weight, bias, norm, activation, residual, gamma
    )
    return dispatch.run(_LINEAR, arguments, impl)


def int8_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    norm: eight_bits.Norm | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """residual + gamma * (gelu(LN(x) @ w1.T + b1) @ w2.T + b2), both products in 8-bit integers.

    The hidden layer is quantised a token, as x is, and never leaves the processor's cache.

    Args:
        x: [..., D], floating point.
        w1: [M, D], b1: [M] or None, w2: [D', M], b2: [D'] or None, in x's dtype; D and M at most
            65536. Their int8 forms are kept as `int8_linear` keeps its weight's.
        norm: LayerNorm's (weight [D], bias [D] or None, eps) to apply to x first, or None.
        residual: [..., D'] in x's dtype, or None.
        gamma: [D'], LayerScale (arXiv 2103.17239), in x's dtype, or None for 1.
        impl: "auto", "reference" or "cpu" (fp32 only).

    Returns:
        [..., D'] in x's dtype. The same bits for any number of threads. GELU is exact to 3e-6, a
        thousandth of the steps that its result is then rounded to.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: a gradient is wanted; the implementation named by `impl` cannot run.
    """
    arguments = eight_bits.mlp_arguments("int8_gelu_mlp", x, w1, b1, w2, b2, norm, residual, gamma)
    return dispatch.run(_MLP, arguments, impl)


def int8_vit_block(
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
    gamma1: Tensor | None = None,
    gamma2: Tensor | None = None,
    key_bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """s = x + gamma1 * proj(attention(qkv(LN(x)))); s + gamma2 * fc2(gelu(fc1(LN(s)))).

    The block of arXiv 2010.11929, eq. (2) and (3), its four linear layers in 8-bit integers as
    `int8_linear` and `int8_gelu_mlp` compute them. The CPU's attention rounds queries, keys,
    values and probabilities to bf16 where the processor multiplies bf16, is fp32 elsewhere, and
    its sums and softmax are fp32.

    Args:
        x: [B, N, D], the residual stream, floating point; every parameter has its dtype.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: [D].
        qkv_weight: [3 * D, D], qkv_bias: [3 * D]; proj_weight: [D, D], proj_bias: [D];
            w1: [M, D], b1: [M]; w2: [D, M], b2: [D]; D and M at most 65536. Every bias may be
            None. Int8 forms are kept as `int8_linear` keeps its weight's.
        num_heads: H; D must be a multiple of it.
        scale: factor on the scores; None for (D / H) ** -0.5.
        eps: of both LayerNorms.
        gamma1, gamma2: [D], LayerScale (arXiv 2103.17239), or None for 1.
        key_bias: [B, N], as for `attention`, or None.
        impl: "auto", "reference" or "cpu" (fp32 only).

    Returns:
        [B, N, D] in x's dtype. The same bits for any number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: a gradient is wanted; the implementation named by `impl` cannot run.
    """
    validate.tensor("x", x, rank=3)
    dim = validate.heads("x", x, num_heads)
    hidden = eight_bits.channels("w1", w1, x, dim)
    validate.present(norm1_weight=norm1_weight, norm2_weight=norm2_weight)
    validate.parameters(
        x,
        ("norm1_weight", norm1_weight, (dim,)),
        ("norm1_bias", norm1_bias, (dim,)),
        ("qkv_weight", qkv_weight, (3 * dim, dim)),
        ("qkv_bias", qkv_bias, (3 * dim,)),
        ("proj_weight", proj_weight, (dim, dim)),
        ("proj_bias", proj_bias, (dim,)),
        ("gamma1", gamma1, (dim,)),
        ("norm2_weight", norm2_weight, (dim,)),
        ("norm2_bias", norm2_bias, (dim,)),
        ("b1", b1, (hidden,)),
        ("b2", b2, (dim,)),
        ("gamma2", gamma2, (dim,)),
        ("key_bias", key_bias, x.shape[:2]),
    )
    eight_bits.channels("w2", w2, x, hidden)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0; got {eps}")
    scale = (dim // num_heads) ** -0.5 if scale is None else float(scale)
    arguments = (
        x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma1,
        norm2_weight, norm2_bias, w1, b1, w2, b2, gamma2, key_bias, num_heads, scale, float(eps),
    )  # fmt: skip
    arguments = eight_bits.without_gradient("int8_vit_block", arguments)
    return dispatch.run(_BLOCK, arguments, impl)


def _limits(implementation: str, *arguments: Any) -> list[str]:
    kinds = {a.dtype for a in arguments if isinstance(a, Tensor)} - {torch.float32}
    return [f"dtype {kind} (fp32 only)" for kind in sorted(kinds, key=str)]


def _block_sizes(x: object, norm1_weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    w1, num_heads = rest[8], rest[14]
    hidden, width = w1.shape
    return width, hidden, num_heads


def _plain_block(x: Tensor, *rest: Any) -> Tensor:
    """The rival: the block in its own dtype, whole where that is faster than its parts."""
    arguments = (x, None, *rest)
    block = BlockArguments(*arguments)
    proportions = block.w1.shape[0], block.num_heads
    if served(x, block.qkv_weight, lambda: proportions):
        options = block._asdict() | {"activation": "gelu"}
        return vit_block(**options)[0]
    return by_parts(*arguments)


_LINEAR = register(
    Operator(
        int8_linear,
        reference.int8_linear,
        _limits,
        sizes=eight_bits.linear_sizes,
        rival=eight_bits.plain_linear(layer_norm, linear),
        eight_bits=True,
    )
)
_MLP = register(
    Operator(
        int8_gelu_mlp,
        reference.int8_gelu_mlp,
        _limits,
        sizes=eight_bits.mlp_sizes,
        rival=eight_bits.plain_mlp(layer_norm, gelu_mlp),
        eight_bits=True,
    )
)
_BLOCK = register(
    Operator(
        int8_vit_block,
        reference.int8_vit_block,
        _limits,
        sizes=_block_sizes,
        by_tokens=True,
        rival=_plain_block,
        eight_bits=True,
    )
)
