"""Attention of a few queries to all keys: a class token's in the last block, a pooling query's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deit.kernels.cross_attention import reference
from deit.kernels.cross_attention import schema as schema
from deit.kernels.engine import autocast, dispatch, validate
from deit.kernels.engine.operator import Operator, register


def cross_attention(
    q: Tensor,
    kv: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(q kT * scale) v for every head (arXiv 1706.03762, eq. 1), queries from elsewhere.

    For few queries: each reads all keys and values anew.

    Args:
        q: [B, R, D], `num_heads` heads of D / num_heads channels.
        kv: [B, N, 2 * D] in q's dtype, N at least 1, as one projection wrote it: k, then v. Read in
            place.
        num_heads: H; D must be a multiple of it.
        scale: factor on the scores; None for (D / H) ** -0.5.
        impl: "auto", "reference" or "cpu". The kernel has no gradients: where one is wanted,
            "auto" runs the reference, which differentiates.

    Returns:
        [B, R, D] in q's dtype, heads concatenated. Softmax and accumulation are fp32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    validate.tensor("q", q, rank=3)
    validate.tensor("kv", kv, rank=3)
    dim = validate.heads("q", q, num_heads)
    q, kv = autocast.cast(q, kv)
    tokens = kv.shape[1]
    if tokens < 1:
        raise ValueError(f"kv: expected at least one token; got shape {tuple(kv.shape)}")
    validate.parameters(q, ("kv", kv, (q.shape[0], tokens, 2 * dim)))
    scale = float((dim // num_heads) ** -0.5) if scale is None else validate.number("scale", scale)
    return dispatch.run(_CROSS_ATTENTION, (q, kv, num_heads, scale), impl)


def _sizes(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Any, ...]:
    return int(q.shape[-1]), num_heads


_CROSS_ATTENTION = register(Operator(cross_attention, reference.cross_attention, sizes=_sizes))
