"""Self-attention on the packed qkv projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deit.kernels.attention import reference
from deit.kernels.attention import schema as schema
from deit.kernels.engine import autocast, dispatch, validate
from deit.kernels.engine.operator import Operator, register
from deit.kernels.engine.registry import COMPILED

# Head dimensions the Triton kernels are compiled and tested for; DeiT's is 64 everywhere. 80 and
# 96 run in tiles of 128 channels, the rest masked.
TRITON_HEAD_DIMS = (32, 64, 80, 96, 128)


def attention(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(q kT * scale + key_bias) v for every head (arXiv 1706.03762, eq. 1).

    Args:
        qkv: [B, N, 3 * D], as the projection wrote it: q, k, v one after another, each of
            `num_heads` heads of D / num_heads channels. Read in place, never permuted.
        num_heads: H; D must be a multiple of it.
        scale: factor on the scores; None for (D / H) ** -0.5.
        key_bias: [B, N], added to every query's scores: log sizes for merged tokens
            (arXiv 2210.09461), -inf for padding. A sample whose keys are all -inf gives
            zeros, as PyTorch's scaled_dot_product_attention does.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, N, D] in qkv's dtype, heads concatenated. Softmax and accumulation are fp32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    validate.tensor("qkv", qkv, rank=3)
    batch, tokens, channels = qkv.shape
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads: expected a positive integer; got {num_heads!r}")
    if channels % (3 * num_heads):
        raise ValueError(
            f"qkv: expected a last axis of 3 * D with D a multiple of num_heads={num_heads}; "
            f"got shape {tuple(qkv.shape)}"
        )
    if key_bias is not None:
        validate.parameters(qkv, ("key_bias", key_bias, (batch, tokens)), fp32_allowed=True)
    head_dim = channels // (3 * num_heads)
    scale = float(head_dim**-0.5) if scale is None else validate.number("scale", scale)
    (qkv,) = autocast.cast(qkv)
    return dispatch.run(_ATTENTION, (qkv, num_heads, scale, key_bias), impl)


def _limits(
    implementation: str, qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None
) -> list[str]:
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if implementation == "triton" and head_dim not in TRITON_HEAD_DIMS:
        return [f"head dimension {head_dim} (served: {TRITON_HEAD_DIMS})"]
    return []


class _Attention(torch.autograd.Function):
    """Differentiates by an implementation's `attention_fwd` and `attention_bwd`."""

    @staticmethod
    def forward(implementation: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        return COMPILED[implementation]["attention_fwd"](*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.implementation, qkv, ctx.num_heads, ctx.scale, key_bias = inputs
        out, lse = output
        ctx.save_for_backward(qkv, out, lse, key_bias)
        ctx.mark_non_differentiable(lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, key_bias = ctx.saved_tensors
        backward = COMPILED[ctx.implementation]["attention_bwd"]
        dqkv = backward(dout, qkv, out, lse, ctx.num_heads, ctx.scale, key_bias)
        return None, dqkv, None, None, None


def _train(implementation: str, *arguments: Any) -> Tensor:
    return _Attention.apply(implementation, *arguments)[0]


_ATTENTION = register(
    Operator(attention, reference.attention, _limits, _train, constants={3: "key_bias"})
)
