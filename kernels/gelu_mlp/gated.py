"""The gated feed-forward block (GLU, arXiv 2002.05202): SwiGLU and its like.

It is no operator of its own: `linear` three times, the gate's activation and all that follows the
last product in their epilogues, with PyTorch's multiplication between. At DINOv2-g's sizes that
pass over the hidden layer is under 1 % of the products' time on a CPU.
"""

from __future__ import annotations

from torch import Tensor

from deit.kernels.engine import autocast, validate
from deit.kernels.layer_norm import layer_norm
from deit.kernels.linear import check_activation, linear


def glu_mlp(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str = "silu",
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """residual + keep * gamma * (N(act(x @ w_gate.T + b_gate) * (x @ w_up.T + b_up)) @ w_down.T
    + b_down), N a LayerNorm or nothing.

    Where gate and up lie packed in one weight [2 * M, D], give its halves: views are read as they
    are.

    Args:
        x: [..., D].
        w_gate, w_up: [M, D], b_gate, b_up: [M] or None, w_down: [D', M], b_down: [D'] or None, in
            x's dtype.
        activation: of the gate: "silu" (SwiGLU), "gelu" (GEGLU), "gelu_tanh" or "quick_gelu".
        norm: a LayerNorm of the hidden layer (EVA-02's) as (weight [M], bias [M] or None, eps), in
            x's dtype or fp32, or None.
        residual, gamma, keep: as for `gelu_mlp`.
        impl: "auto", "reference", "cpu", "triton" or "cuda", of `linear` and `layer_norm`; cuda's
            products have GELU alone.

    Returns:
        [..., D'], in residual's dtype where there is one, else in x's. The hidden layer is rounded
        to x's dtype before and after the multiplication, as in PyTorch.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    validate.tensor("x", x)
    hidden, width = validate.rows("w_gate", w_gate), validate.rows("w_down", w_down)
    validate.present(w_up=w_up)
    x, w_gate, b_gate, w_up, b_up, w_down, b_down = autocast.cast(
        x, w_gate, b_gate, w_up, b_up, w_down, b_down
    )
    validate.parameters(
        x,
        ("w_gate", w_gate, (hidden, x.shape[-1])),
        ("b_gate", b_gate, (hidden,)),
        ("w_up", w_up, (hidden, x.shape[-1])),
        ("b_up", b_up, (hidden,)),
        ("w_down", w_down, (width, hidden)),
        ("b_down", b_down, (width,)),
    )
    if norm is not None:
        if not isinstance(norm, tuple) or len(norm) != 3:
            raise TypeError(f"norm: expected (weight, bias, eps); got {type(norm).__name__}")
        named = (("norm's weight", norm[0], (hidden,)), ("norm's bias", norm[1], (hidden,)))
        validate.parameters(x, *named, fp32_allowed=True)
    check_activation(activation)
    validate.epilogue(x, width, residual, gamma, keep)
    gated = linear(x, w_gate, b_gate, activation=activation, impl=impl)
    gated = gated * linear(x, w_up, b_up, impl=impl)
    if norm is not None:
        gated = layer_norm(gated, *norm, impl=impl)
    return linear(gated, w_down, b_down, residual=residual, gamma=gamma, keep=keep, impl=impl)
