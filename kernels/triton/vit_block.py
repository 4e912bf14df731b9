"""A whole pre-norm block in four launches, or five where the MLP's hidden layer is in memory.

    qkv = LN1(x) @ Wqkv.T            LN1 in the prologue, from the statistics that came with x
    mixed = attention(qkv)
    s = x + proj(mixed)              writes the statistics of s
    y = s + fc2(gelu(fc1(LN2(s))))   LN2 in the prologue; writes the statistics of y

Neither LayerNorm is a pass over memory: each would read and write the stream, 2 * T * D elements.
"""

from __future__ import annotations

from torch import Tensor

from deit.kernels.triton import attention as attention_module
from deit.kernels.triton import common, configs, gelu_mlp, launching, linear
from deit.kernels.triton import row_stats as statistics
from deit.kernels.triton.norm_linear import norm_linear


@launching.kept
def vit_block(
    x: Tensor,
    row_stats: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma2: Tensor | None,
    key_bias: Tensor | None,
    num_heads: int,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`deit.kernels.vit_block` on Triton; strides as for `linear`."""
    if row_stats is None:
        row_stats = statistics.row_stats(x)
    norm1 = statistics.Norm(row_stats, norm1_weight, norm1_bias, eps)
    qkv = norm_linear(x, norm1, qkv_weight, qkv_bias)
    mixed = attention_module.attention(qkv, num_heads, scale, key_bias)
    s, row_stats = linear_stats(mixed, proj_weight, proj_bias, x, gamma1)
    norm2 = statistics.Norm(row_stats, norm2_weight, norm2_bias, eps)
    return norm_mlp(s, norm2, w1, b1, w2, b2, gamma2)


def linear_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
    *,
    config: configs.LinearConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + gamma * (x @ weight.T + bias), in residual's dtype, and its row statistics."""
    row_stats = statistics.empty(residual)
    out, launch = linear.plan(
        x, weight, bias, None, residual, gamma, None, row_stats=row_stats, config=config
    )
    if launch is not None:
        launch.run(x)
    return out, row_stats


def norm_mlp(
    x: Tensor,
    norm: statistics.Norm,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma: Tensor | None,
    *,
    config: configs.MlpConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """x + gamma * (gelu(LN(x) @ w1.T + b1) @ w2.T + b2), in x's dtype, and its row statistics.

    In one kernel where `configs.gelu_mlp` has an entry (or `config` is given) and its
    descriptors can take the tensors, else in two products.
    """
    if config is None:
        config = configs.gelu_mlp(common.architecture(x), w1.dtype, x.shape[-1])
    row_stats = statistics.empty(x)
    if config is not None:
        planned = gelu_mlp.plan(
            x, w1, b1, w2, b2, x, gamma, None, norm=norm, row_stats=row_stats, config=config
        )
        if planned is not None:
            out, launch = planned
            launch.run(x)
            return out, row_stats
    hidden = norm_linear(x, norm, w1, b1, "gelu")
    return linear_stats(hidden, w2, b2, x, gamma)
