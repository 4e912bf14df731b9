"""Self-attention on the packed qkv projection, with rotary positions or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.attention import reference
from deit.kernels.attention import schema as schema
from deit.kernels.engine import autocast, dispatch, limits, validate
from deit.kernels.engine.derivatives import once_differentiable
from deit.kernels.engine.operator import Operator, register
from deit.kernels.engine.registry import COMPILED

# Head dimensions the Triton kernels are compiled and tested for; DeiT's is 64 everywhere. 80 and
# 96 run in tiles of 128 channels, the rest masked.
TRITON_HEAD_DIMS = (32, 64, 80, 96, 128)
# With rotary positions wider heads spill registers.
TRITON_ROTARY_HEAD_DIMS = (32, 64)
CUDA_WIDEST_HEAD = 128  # csrc/cuda/attention.h


def attention(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    prefix: int = 0,
    interleaved: bool = False,
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
        rope, prefix, interleaved: rotary positions: (sin, cos) and the rest as
            `rotary_attention` takes them, which then serves the call; not beside a key_bias.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, N, D] in qkv's dtype, heads concatenated. Softmax and accumulation are fp32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    if rope is not None:
        sin, cos = _tables(rope, key_bias)
        return rotary_attention(
            qkv,
            num_heads,
            sin,
            cos,
            prefix=prefix,
            interleaved=interleaved,
            scale=scale,
            impl=impl,
        )
    if prefix or interleaved:
        raise ValueError("rope: expected (sin, cos) beside prefix and interleaved; got None")
    head_dim = _head_dim(qkv, num_heads)
    if key_bias is not None:
        validate.parameters(qkv, ("key_bias", key_bias, qkv.shape[:2]), fp32_allowed=True)
    scale = float(head_dim**-0.5) if scale is None else validate.number("scale", scale)
    (qkv,) = autocast.cast(qkv)
    return dispatch.run(_ATTENTION, (qkv, num_heads, scale, key_bias), impl)


def rotary_attention(
    qkv: Tensor,
    num_heads: int,
    sin: Tensor,
    cos: Tensor,
    *,
    prefix: int = 0,
    interleaved: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`attention` with rotary positions (arXiv 2104.09864) of queries and keys.

    A query or key x of a patch token becomes x * cos + turned(x) * sin, where `turned` takes each
    pair (a, b) of its channels to (-b, a). It is rotated as it is loaded; kernels compute it in
    fp32.

    Args:
        qkv: [B, N, 3 * D], as for `attention`; D / H must be even.
        num_heads: H.
        sin, cos: [N - prefix, D / H], or [H, N - prefix, D / H] where every head has its own, in
            qkv's dtype or fp32. Rows need not be side by side. Kernels have no gradient for them:
            where one is wanted, "auto" runs the reference, which differentiates.
        prefix: how many of the first tokens are left as they are (class token, registers).
        interleaved: whether the pairs are channels (2 i, 2 i + 1), as in RoPE ViTs and EVA-02;
            else (i, i + D / (2 H)), as in DINOv3.
        scale: factor on the scores; None for (D / H) ** -0.5.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, N, D] in qkv's dtype, as `attention`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    head_dim = _head_dim(qkv, num_heads)
    if head_dim % 2:
        raise ValueError(
            f"qkv: expected heads of an even number of channels, rotated in pairs; got {head_dim}"
        )
    tokens = qkv.shape[1]
    whole = isinstance(prefix, (int, torch.SymInt)) and not isinstance(prefix, bool)
    if not whole or not 0 <= prefix <= tokens:
        raise ValueError(f"prefix: expected an integer from 0 to N={tokens}; got {prefix!r}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved: expected a bool; got {type(interleaved).__name__}")
    validate.present(sin=sin, cos=cos)
    each = isinstance(sin, Tensor) and sin.dim() == 3
    shape = (num_heads, tokens - prefix, head_dim)[not each :]
    (qkv,) = autocast.cast(qkv)
    validate.parameters(qkv, ("sin", sin, shape), ("cos", cos, shape), fp32_allowed=True)
    scale = float(head_dim**-0.5) if scale is None else validate.number("scale", scale)
    arguments = (qkv, num_heads, scale, sin, cos, prefix, interleaved)
    return dispatch.run(_ROTARY_ATTENTION, arguments, impl)


def _head_dim(qkv: Tensor, num_heads: int) -> int:
    """The channels of a head, with qkv and num_heads checked."""
    validate.tensor("qkv", qkv, rank=3)
    return validate.heads("qkv", qkv, num_heads, parts=3) // num_heads


def _tables(rope: Any, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        raise TypeError(f"rope: expected a pair (sin, cos); got {type(rope).__name__}")
    if key_bias is not None:
        raise ValueError("rope: expected no key_bias beside it, positions are of a grid; got both")
    return rope[0], rope[1]


def _limits(implementation: str, qkv: Tensor, num_heads: int, *_: Any) -> list[str]:
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if implementation == "triton" and head_dim not in TRITON_HEAD_DIMS:
        return [f"head dimension {head_dim} (served: {TRITON_HEAD_DIMS})"]
    if implementation != "cuda":
        return []
    found = limits.cuda_limits(qkv)
    if head_dim > CUDA_WIDEST_HEAD:
        found.append(f"head dimension {head_dim} (served: up to {CUDA_WIDEST_HEAD})")
    return found


def _rotary_limits(implementation: str, qkv: Tensor, num_heads: int, *_: Any) -> list[str]:
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if implementation == "triton" and head_dim not in TRITON_ROTARY_HEAD_DIMS:
        served = f"with rotary positions {TRITON_ROTARY_HEAD_DIMS}"
        return [f"head dimension {head_dim} (served: {served})"]
    return []


class _Attention(torch.autograd.Function):
    """Differentiates by an implementation's `_fwd` and `_bwd` of either operator.

    rest: what follows the scale in the schema, of which nothing has a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operator: str,
        implementation: str,
        qkv: Tensor,
        heads: int,
        scale: float,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = COMPILED[implementation][f"{operator}_fwd"](qkv, heads, scale, *rest)
        ctx.kernel, ctx.geometry = (implementation, f"{operator}_bwd"), (heads, scale)
        tensors = [value for value in rest if isinstance(value, Tensor)]
        ctx.rest = tuple(None if isinstance(value, Tensor) else value for value in rest)
        ctx.places = [i for i, value in enumerate(rest) if isinstance(value, Tensor)]
        ctx.save_for_backward(qkv, out, lse, *tensors)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for lse
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, *tensors = ctx.saved_tensors
        rest = list(ctx.rest)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            rest[place] = tensor
        implementation, kernel = ctx.kernel
        dqkv = COMPILED[implementation][kernel](dout, qkv, out, lse, *ctx.geometry, *rest)
        return None, None, dqkv, None, None, *(None for _ in rest)


def _train(implementation: str, *arguments: Any) -> Tensor:
    return _Attention.apply("attention", implementation, *arguments)[0]


def _train_rotary(implementation: str, *arguments: Any) -> Tensor:
    return _Attention.apply("rotary_attention", implementation, *arguments)[0]


def _sizes(
    qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None
) -> tuple[int, int, bool]:
    return int(qkv.shape[-1]) // 3, num_heads, key_bias is not None


def _rotary_sizes(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    sin: object,
    cos: object,
    prefix: int,
    interleaved: bool,
) -> tuple[int, int, bool]:
    return int(qkv.shape[-1]) // 3, num_heads, interleaved


_ATTENTION = register(
    Operator(
        attention,
        reference.attention,
        _limits,
        _train,
        constants={3: "key_bias"},
        sizes=_sizes,
        by_tokens=True,
    )
)
_ROTARY_ATTENTION = register(
    Operator(
        rotary_attention,
        reference.rotary_attention,
        _rotary_limits,
        _train_rotary,
        constants={3: "sin", 4: "cos"},
        sizes=_rotary_sizes,
        by_tokens=True,
    )
)
