"""Linear layers and MLPs in 8-bit integers, for inference; chosen by name, never for anyone.

Weights are quantised symmetrically with a scale an output channel, once, and kept while they do not
change; activations with a scale and a zero point a token, as they pass: nothing is calibrated.
Sums are exact in int32. LayerNorm, bias, GELU, residual and LayerScale are fp32, in the same visit
of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels import dispatch, validate

MAX_DEPTH = 65536  # 255 * 127 * depth stays below 2**31

Norm = tuple[Tensor, "Tensor | None", float]


def int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """residual + gamma * act(LN(x) @ weight.T + bias), the product in 8-bit integers.

    Args:
        x: [..., K], floating point, K at most 65536.
        weight: [M, K] and bias: [M] or None, in x's dtype. The weight's int8 form is kept between
            calls and made anew when the weight changes (`deit.kernels.packing`).
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
    arguments = _prepare_linear(
        x, weight, bias, norm=norm, activation=activation, residual=residual, gamma=gamma
    )
    return dispatch.run(_LINEAR, arguments, impl)


def int8_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    norm: Norm | None = None,
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
    arguments = _prepare_mlp(x, w1, b1, w2, b2, norm=norm, residual=residual, gamma=gamma)
    return dispatch.run(_MLP, arguments, impl)


def _prepare_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
) -> dispatch.Arguments:
    validate.tensor("x", x)
    width = _weight("weight", weight, x, x.shape[-1])
    validate.parameters(x, ("bias", bias, (width,)))
    if activation not in (None, "gelu"):
        raise ValueError(f"activation: expected None or 'gelu'; got {activation!r}")
    if activation is not None and (residual is not None or gamma is not None):
        raise ValueError("activation: expected None beside residual or gamma; got 'gelu'")
    _epilogue(x, width, residual, gamma)
    arguments = (x, weight, bias, *_norm(norm, x), activation == "gelu", residual, gamma)
    return _without_gradient("int8_linear", arguments)


def _prepare_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
) -> dispatch.Arguments:
    validate.tensor("x", x)
    hidden = _weight("w1", w1, x, x.shape[-1])
    width = _weight("w2", w2, x, hidden)
    validate.parameters(x, ("b1", b1, (hidden,)), ("b2", b2, (width,)))
    _epilogue(x, width, residual, gamma)
    arguments = (x, w1, b1, w2, b2, *_norm(norm, x), residual, gamma)
    return _without_gradient("int8_gelu_mlp", arguments)


def _weight(name: str, weight: Tensor, x: Tensor, depth: int) -> int:
    """The output channels of a weight [M, depth] of x's dtype."""
    width = validate.rows(name, weight)
    validate.parameters(x, (name, weight, (width, depth)))
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


def _without_gradient(name: str, arguments: dispatch.Arguments) -> dispatch.Arguments:
    if dispatch.needs_gradient(arguments):
        raise NotImplementedError(
            f"{name}: a tensor requires grad, and rounding to 8 bits has no gradient: call it "
            "under torch.no_grad() or torch.inference_mode()"
        )
    return arguments


def _limits(implementation: str, *arguments: Any) -> list[str]:
    kinds = {a.dtype for a in arguments if isinstance(a, Tensor)} - {torch.float32}
    return [f"dtype {kind} (fp32 only)" for kind in sorted(kinds, key=str)]


_LINEAR = dispatch.Operator("int8_linear", _prepare_linear, _limits)
_MLP = dispatch.Operator("int8_gelu_mlp", _prepare_mlp, _limits)
