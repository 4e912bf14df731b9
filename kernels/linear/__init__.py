"""A linear layer; bias, activation, LayerScale, stochastic depth and residual its epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import autocast, dispatch, limits, validate
from deit.kernels.engine.derivatives import gradients, once_differentiable
from deit.kernels.engine.operator import Operator, register
from deit.kernels.engine.registry import COMPILED
from deit.kernels.linear import reference
from deit.kernels.linear import schema as schema

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """residual + keep * gamma * act(x @ weight.T + bias).

    Args:
        x: [..., K].
        weight: [M, K] and bias: [M] or None, in x's dtype.
        activation: None, "gelu" (exact, by erf: what every DeiT checkpoint expects), "gelu_tanh"
            (its approximation: SigLIP), "quick_gelu" (y * sigmoid(1.702 * y): CLIP) or "silu"
            (y * sigmoid(y)).
        residual: [..., M], in x's dtype or fp32, or None.
        gamma: [M], LayerScale (arXiv 2103.17239), or None for 1.
        keep: [B] for x [B, ..., K], stochastic depth's factor for each sample, or None for 1.
        impl: "auto", "reference", "cpu", "triton", "cuda" or "cublaslt".

    Returns:
        [..., M], in residual's dtype where there is one, else in x's. Accumulation is fp32;
        fp32 products are IEEE, never tf32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    validate.tensor("x", x)
    width = validate.rows("weight", weight)
    x, weight, bias = autocast.cast(x, weight, bias)
    validate.parameters(x, ("weight", weight, (width, x.shape[-1])), ("bias", bias, (width,)))
    if activation is not None:
        check_activation(activation, "None or ")
    validate.epilogue(x, width, residual, gamma, keep)
    arguments = (x, weight, bias, activation, residual, gamma, keep)
    return dispatch.run(_LINEAR, arguments, impl)


def check_activation(activation: object, before: str = "") -> None:
    """Raise ValueError unless `activation` is the name of one; `before`: what else is expected."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected {before}one of {', '.join(map(repr, ACTIVATIONS))}; "
            f"got {activation!r}"
        )


def _limits(implementation: str, x: Tensor, weight: Tensor, *_: Any) -> list[str]:
    return limits.product_limits(implementation, x, weight)


class _Linear(torch.autograd.Function):
    """Differentiates by an implementation's `linear_fwd` and `linear_bwd`."""

    @staticmethod
    def forward(ctx: Any, implementation: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, affine = COMPILED[implementation]["linear_fwd"](*arguments)
        x, weight, _, ctx.activation, _, gamma, keep = arguments
        ctx.implementation = implementation
        _, _, of_weight, *_, of_gamma, _ = ctx.needs_input_grad
        reads_affine = ctx.activation is not None or of_gamma
        ctx.save_for_backward(
            x if of_weight else None, weight, affine if reads_affine else None, gamma, keep
        )
        ctx.mark_non_differentiable(affine)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for affine
        return out, affine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, affine, gamma, keep = ctx.saved_tensors
        kernel = COMPILED[ctx.implementation]["linear_bwd"]

        def backward(wanted: list[bool]) -> tuple[Tensor, ...]:
            return kernel(dout, x, weight, affine, ctx.activation, gamma, keep, wanted)

        found = gradients(ctx, backward, (1, 2, 3, 6))
        found[5] = dout if ctx.needs_input_grad[5] else None
        return tuple(found)


def train(implementation: str, *arguments: Any) -> Tensor:
    """The linear layer, differentiable by `implementation`'s own kernels."""
    x, weight, bias, activation, residual, gamma, keep = arguments
    if residual is x:  # torch.compile traces no autograd.Function given one tensor twice
        residual = x.view_as(x)
    return _Linear.apply(implementation, x, weight, bias, activation, residual, gamma, keep)[0]


def _sizes(
    x: object, weight: Tensor, bias: object, activation: str | None, residual: object, *_: object
) -> tuple[Any, ...]:
    width, depth = weight.shape
    return depth, width, activation, residual is not None


_LINEAR = register(
    Operator(
        linear,
        reference.linear,
        _limits,
        train,
        constants={6: "keep"},
        sizes=_sizes,
    )
)
