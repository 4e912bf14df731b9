"""Backward of `gelu_mlp`: one elementwise pass, four products, the first through its activation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deit.kernels.device import launching
from deit.kernels.linear import triton_bwd as linear_bwd
from deit.kernels.linear import triton_gradients as products


@launching.kept
def gelu_mlp_bwd(
    dout: Tensor,
    x: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    affine: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    wanted: Sequence[bool] | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dw1, db1, dw2, db2, dgamma), each as its forward argument.

    Those not `wanted` are empty, and so is dgamma without gamma. Four products and one elementwise
    pass. The first product's epilogue goes through the activation: it reads hidden, and writes the
    gradient there, act(hidden), and db1's partial sums.
    """
    of_x, of_w1, of_b1, of_w2, of_b2, of_gamma = wanted or (True,) * 6
    through = of_x or of_w1 or of_b1 or of_w2
    g2, db2, dgamma = linear_bwd.output_gradient(
        dout, w2.dtype, affine, None, gamma, keep, of_g=through, of_bias=of_b2, of_gamma=of_gamma
    )
    dx, dw1, db1, dw2 = (w1.new_empty(0) for _ in range(4))
    if not through:
        return dx, dw1, db1, dw2, db2, dgamma
    rows, channels = g2.shape[0], w1.shape[0]
    g1, activated, db1 = products.hidden_gradient(
        g2,
        w2,
        hidden.reshape(rows, channels).contiguous(),
        activation or "gelu",
        of_weight=of_w2,
        of_bias=of_b1,
    )
    if of_w2:
        dw2 = products.weight_gradient(g2, activated)
    del activated, g2  # T * M elements that need not live through the other two products
    if of_w1:
        assert x is not None  # as the schema has it
        dw1 = products.weight_gradient(g1, x)
    if of_x:
        dx = products.input_gradient(g1, w1).view(*hidden.shape[:-1], w1.shape[1])
    return dx, dw1, db1, dw2, db2, dgamma
