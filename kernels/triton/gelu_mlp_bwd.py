"""Backward of `gelu_mlp`: one elementwise pass and four products, the first through GELU."""

from __future__ import annotations

from torch import Tensor

from deit.kernels.triton import launching, linear_bwd, products


@launching.kept
def gelu_mlp_bwd(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    affine: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dw1, db1, dw2, db2, dgamma), each as its forward argument; dgamma empty without gamma.

    Four products and one elementwise pass. The first product's epilogue goes through GELU: it
    reads hidden, and writes the gradient there, gelu(hidden), and db1's partial sums.
    """
    g2, db2, dgamma = linear_bwd.output_gradient(dout, x.dtype, affine, None, gamma, keep)
    rows, channels = g2.shape[0], w1.shape[0]
    g1, activated, db1 = products.gelu_input_gradient(
        g2, w2, hidden.reshape(rows, channels).contiguous()
    )
    dw2 = products.weight_gradient(g2, activated)
    del activated, g2  # T * M elements that need not live through the other two products
    dw1 = products.weight_gradient(g1, x)
    dx = products.input_gradient(g1, w1).view(x.shape)
    return dx, dw1, db1, dw2, db2, dgamma
