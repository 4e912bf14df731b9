"""What the operators in 8 bits share: schemas, fakes, references, public arguments, checked.

They stand apart because what holds for every other operator, gradients and the error rule against
fp64, cannot hold for a product that rounds its factors to 8 bits.

`norm_weight`, `norm_bias` and `eps` are a LayerNorm's that comes before the product; weights are
the floating-point ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deit.kernels.engine import validate
from deit.kernels.engine.derivatives import has_tangent, needs_gradient
from deit.kernels.engine.fakes import projected
from deit.kernels.engine.operator import Arguments

MAX_DEPTH = 65536  # integers: 255 * 127 * depth stays below 2**31

Norm = tuple[Tensor, "Tensor | None", float]

NORM = "Tensor? norm_weight, Tensor? norm_bias, float eps"
LINEAR = (
    f"(Tensor x, Tensor weight, Tensor? bias, {NORM}, bool gelu, Tensor? residual, "
    "Tensor? gamma) -> Tensor"
)
MLP = (
    f"(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, {NORM}, "
    "Tensor? residual, Tensor? gamma) -> Tensor"
)


def fake_linear(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """The fake of LINEAR."""
    return projected(x, weight.shape[0])


def fake_mlp(x: Tensor, w1: Tensor, b1: object, w2: Tensor, *_: object) -> Tensor:
    """The fake of MLP."""
    return projected(x, w2.shape[0])


def linear_sizes(
    x: object,
    weight: Tensor,
    bias: object,
    norm_weight: object,
    norm_bias: object,
    eps: float,
    gelu: bool,
    residual: object,
    gamma: object,
) -> tuple[int | bool, ...]:
    """`Operator.sizes` of LINEAR."""
    width, depth = weight.shape
    return depth, width, gelu, norm_weight is not None, residual is not None


def mlp_sizes(
    x: object, w1: Tensor, b1: object, w2: object, b2: object, norm_weight: object, *_: object
) -> tuple[int | bool, ...]:
    """`Operator.sizes` of MLP."""
    hidden, width = w1.shape
    return width, hidden, norm_weight is not None


# x wT + bias with x and the weight rounded to 8 bits: all that tells one reference from another.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(
    product: Product,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Tensor:
    """The reference of LINEAR: residual + gamma * act(LN(x) wT + bias)."""
    y = product(normalised(x, norm_weight, norm_bias, eps), weight, bias)
    return joined(F.gelu(y) if gelu else y, residual, gamma)


def gelu_mlp(
    product: Product,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Tensor:
    """The reference of MLP: residual + gamma * (gelu(LN(x) w1T + b1) w2T + b2)."""
    hidden = F.gelu(product(normalised(x, norm_weight, norm_bias, eps), w1, b1))
    return joined(product(hidden, w2, b2), residual, gamma)


def plain_linear(norm: Callable[..., Tensor], product: Callable[..., Tensor]) -> Any:
    """The rival of LINEAR: the same in the arguments' own dtype by these public operators."""

    def rival(
        x: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any, eps: float,
        gelu: bool, residual: Any, gamma: Any,
    ) -> Tensor:  # fmt: skip
        if norm_weight is not None:
            x = norm(x, norm_weight, norm_bias, eps=eps)
        activation = "gelu" if gelu else None
        return product(x, weight, bias, activation=activation, residual=residual, gamma=gamma)

    return rival


def plain_mlp(norm: Callable[..., Tensor], mlp: Callable[..., Tensor]) -> Any:
    """The rival of MLP, in the same way."""

    def rival(
        x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, norm_weight: Any, norm_bias: Any,
        eps: float, residual: Any, gamma: Any,
    ) -> Tensor:  # fmt: skip
        if norm_weight is not None:
            x = norm(x, norm_weight, norm_bias, eps=eps)
        return mlp(x, w1, b1, w2, b2, residual=residual, gamma=gamma)

    return rival


def normalised(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    """LN(x), or x where there is no weight."""
    if norm_weight is None:
        return x
    return F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)


def joined(y: Tensor, residual: Tensor | None, gamma: Tensor | None) -> Tensor:
    """residual + gamma * y."""
    y = y if gamma is None else y * gamma
    return y if residual is None else residual + y


def linear_arguments(
    operator: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Arguments:
    """`operator`'s, a linear layer's, checked; raises what `int8_linear` and `fp8_linear` state."""
    validate.tensor("x", x)
    width = channels("weight", weight, x, x.shape[-1])
    validate.parameters(x, ("bias", bias, (width,)))
    if activation not in (None, "gelu"):
        raise ValueError(f"activation: expected None or 'gelu'; got {activation!r}")
    if activation is not None and (residual is not None or gamma is not None):
        raise ValueError("activation: expected None beside residual or gamma; got 'gelu'")
    _epilogue(x, width, residual, gamma)
    arguments = (x, weight, bias, *_norm(norm, x), activation == "gelu", residual, gamma)
    return without_gradient(operator, arguments)


def mlp_arguments(
    operator: str,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Arguments:
    """`operator`'s, an MLP's, checked; raises what `int8_gelu_mlp` and `fp8_gelu_mlp` state."""
    validate.tensor("x", x)
    hidden = channels("w1", w1, x, x.shape[-1])
    width = channels("w2", w2, x, hidden)
    validate.parameters(x, ("b1", b1, (hidden,)), ("b2", b2, (width,)))
    _epilogue(x, width, residual, gamma)
    arguments = (x, w1, b1, w2, b2, *_norm(norm, x), residual, gamma)
    return without_gradient(operator, arguments)


def channels(name: str, value: Tensor, x: Tensor, depth: int) -> int:
    """The output channels of a weight [M, depth] of x's dtype."""
    width = validate.rows(name, value)
    validate.parameters(x, (name, value, (width, depth)))
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"{name}: expected a depth of 1 to {MAX_DEPTH}; got {depth}")
    if width == 0:
        raise ValueError(f"{name}: expected at least one output channel; got none")
    return width


def _epilogue(x: Tensor, width: int, residual: Tensor | None, gamma: Tensor | None) -> None:
    shape = (*x.shape[:-1], width)
    validate.parameters(x, ("residual", residual, shape), ("gamma", gamma, shape[-1:]))


def _norm(norm: Norm | None, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    if norm is None:
        return None, None, 0.0
    if not isinstance(norm, tuple) or len(norm) != 3:
        raise TypeError(f"norm: expected (weight, bias, eps) or None; got {norm!r}")
    weight, bias, eps = norm
    validate.tensor("norm's weight", weight)
    shape = x.shape[-1:]
    validate.parameters(x, ("norm's weight", weight, shape), ("norm's bias", bias, shape))
    return weight, bias, float(eps)


def without_gradient(operator: str, arguments: Arguments) -> Arguments:
    """The arguments; NotImplementedError where autograd wants the call's derivatives."""
    if needs_gradient(arguments):
        raise NotImplementedError(
            f"{operator}: a tensor requires grad, and rounding to 8 bits has no gradient: call it "
            "under torch.no_grad() or torch.inference_mode()"
        )
    if has_tangent(arguments):
        raise NotImplementedError(
            f"{operator}: a tensor has a forward-mode tangent, and rounding to 8 bits has no "
            "derivative"
        )
    return arguments
