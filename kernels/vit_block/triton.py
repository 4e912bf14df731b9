"""A whole pre-norm block: in four launches where LayerNorm is a prologue, in seven elsewhere.

    qkv = LN1(x) @ Wqkv.T            LN1 in the prologue, from the statistics that came with x
    mixed = attention(qkv)
    s = x + proj(mixed)              writes the statistics of s
    y = s + fc2(act(fc1(LN2(s))))   one kernel, LN2 its prologue; writes the statistics of y

So no LayerNorm is a pass over memory, which would read and write the stream, 2 * T * D elements.
Where rows are too wide to be kept on chip (linear/triton_norm_linear.py), LN1 and LN2 are kernels
of their own, fc1 and fc2 two products, and of all statistics only those of y are written, for the
caller.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deit.kernels.attention import triton as attention_module
from deit.kernels.device import common, launching
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.gelu_mlp import triton as gelu_mlp
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as linear
from deit.kernels.linear import triton_row_stats as statistics
from deit.kernels.linear.triton_norm_linear import norm_linear
from deit.kernels.vit_block.arguments import BlockArguments


@launching.kept
def vit_block(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`deit.kernels.vit_block` on Triton; strides as for `linear`."""
    block = BlockArguments(*arguments)
    x, row_stats, weight = block.x, block.row_stats, block.qkv_weight
    panel = linear_tiles.norm_panel(common.architecture(x), weight.dtype, *weight.shape)
    norm1 = statistics.Norm(row_stats, block.norm1_weight, block.norm1_bias, block.eps)
    qkv = norm_linear(x, norm1, weight, block.qkv_bias, config=panel)
    mixed = attention_module.attention(qkv, block.num_heads, block.scale, block.key_bias)
    proj, form = (block.proj_weight, block.proj_bias), mlp_form(x, block.w1)
    if form is None:  # no prologue reads the statistics of s
        s, row_stats = linear.linear(mixed, *proj, None, x, block.gamma1, None), None
    else:
        s, row_stats = linear_stats(mixed, *proj, x, block.gamma1)
    norm2 = statistics.Norm(row_stats, block.norm2_weight, block.norm2_bias, block.eps)
    mlp = (block.w1, block.b1, block.w2, block.b2)
    activation = block.activation or "gelu"
    return norm_mlp(s, norm2, *mlp, block.gamma2, activation, config=form)


def mlp_form(x: Tensor, w1: Tensor) -> gelu_mlp_tiles.MlpConfig | linear_tiles.PanelConfig | None:
    """The MLP in one kernel, its first product by panel, or LayerNorm by itself: None."""
    single = gelu_mlp_tiles.gelu_mlp(*gelu_mlp_tiles.asked(x, w1.dtype))
    return single or linear_tiles.norm_panel(common.architecture(x), w1.dtype, *w1.shape)


def linear_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
    *,
    config: linear_tiles.LinearConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + gamma * (x @ weight.T + bias), in residual's dtype, and its row statistics."""
    row_stats = statistics.empty(residual)
    planned = linear.plan(
        x, weight, bias, None, residual, gamma, None, row_stats=row_stats, config=config
    )
    return common.written(planned, x), row_stats


def norm_mlp(
    x: Tensor,
    norm: statistics.Norm,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gamma: Tensor | None,
    activation: str = "gelu",
    *,
    config: gelu_mlp_tiles.MlpConfig | linear_tiles.PanelConfig | None,
) -> tuple[Tensor, Tensor]:
    """x + gamma * (act(LN(x) @ w1.T + b1) @ w2.T + b2), in x's dtype, and its row statistics.

    In the form of `config` (`mlp_form`) where its descriptors can take the tensors.
    """
    panel = config if isinstance(config, linear_tiles.PanelConfig) else None
    if isinstance(config, gelu_mlp_tiles.MlpConfig):
        row_stats = statistics.empty(x)
        complete, statistics_launch = statistics.completed(norm, x)
        planned = gelu_mlp.plan(
            x, w1, b1, w2, b2, x, gamma, None, activation,
            norm=complete, row_stats=row_stats, config=config,
        )  # fmt: skip
        if planned is not None:
            out, launch = planned
            return common.written((out, (statistics_launch, launch)), x), row_stats
    hidden = norm_linear(x, norm, w1, b1, activation, config=panel)
    return linear_stats(hidden, w2, b2, x, gamma)
