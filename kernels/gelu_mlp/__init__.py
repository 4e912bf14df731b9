"""The transformer's feed-forward block: two linear layers with GELU or its like between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deit.kernels.engine import autocast, dispatch, limits, validate
from deit.kernels.engine.derivatives import gradients, needs_gradient, once_differentiable
from deit.kernels.engine.operator import Operator, register
from deit.kernels.engine.registry import COMPILED
from deit.kernels.gelu_mlp import reference
from deit.kernels.gelu_mlp import schema as schema
from deit.kernels.linear import check_activation
from deit.kernels.linear import train as train_linear


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    """residual + keep * gamma * (act(x @ w1.T + b1) @ w2.T + b2), act GELU or its like.

    Args:
        x: [..., D].
        w1: [M, D], b1: [M] or None, w2: [D', M], b2: [D'] or None, in x's dtype.
        activation: "gelu" (exact, by erf), "gelu_tanh", "quick_gelu" or "silu", as for `linear`.
        residual: [..., D'], in x's dtype or fp32, or None.
        gamma: [D'], LayerScale (arXiv 2103.17239), or None for 1.
        keep: [B] for x [B, ..., D], stochastic depth's factor for each sample, or None for 1.
        recompute: keep no hidden layer for the backward, which then computes x @ w1.T + b1
            again. Saves T * M elements of x's dtype (DeiT-B, batch 256, bf16: 310 MB a block)
            for a seventh product beside a step's six. The reference keeps only its inputs
            (torch.utils.checkpoint) and computes its whole forward again. Changes nothing where
            no input requires grad.
        impl: "auto", "reference", "cpu", "triton", "cuda" or "cublaslt".

    Returns:
        [..., D'], in residual's dtype where there is one, else in x's. The hidden layer is
        rounded to x's dtype between the two products, as in PyTorch.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute: expected a bool; got {type(recompute).__name__}")
    validate.tensor("x", x)
    hidden, width = validate.rows("w1", w1), validate.rows("w2", w2)
    x, w1, b1, w2, b2 = autocast.cast(x, w1, b1, w2, b2)
    validate.parameters(
        x,
        ("w1", w1, (hidden, x.shape[-1])),
        ("b1", b1, (hidden,)),
        ("w2", w2, (width, hidden)),
        ("b2", b2, (width,)),
    )
    validate.epilogue(x, width, residual, gamma, keep)
    named = None  # the exact GELU: without a string to hand over
    if activation != "gelu":
        check_activation(activation)
        named = activation
    arguments = (x, w1, b1, w2, b2, residual, gamma, keep, named)
    operator = _RECOMPUTED if recompute and needs_gradient(arguments) else _GELU_MLP
    return dispatch.run(operator, arguments, impl)


def _limits(
    implementation: str, x: Tensor, w1: Tensor, b1: object, w2: Tensor, *_: Any
) -> list[str]:
    return limits.product_limits(implementation, x, w1, w2)


class _GeluMlp(torch.autograd.Function):
    """Differentiates by an implementation's `gelu_mlp_fwd` and `gelu_mlp_bwd`.

    The hidden layer is kept as it was before its activation, [..., M] in x's dtype. Where it is to
    be recomputed, the forward keeps no more than fc2's output, and that only for gamma's gradient,
    and the backward calls `linear` for the hidden layer again: the same kernel on the same input.
    """

    @staticmethod
    def forward(
        ctx: Any, implementation: str, recompute: bool, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = COMPILED[implementation]
        x, w1, b1, w2, b2, residual, gamma, keep, activation = arguments
        if not recompute:
            out, hidden, affine = kernels["gelu_mlp_fwd"](*arguments)
        elif gamma is None:  # in one kernel, where the implementation has that
            out, hidden, affine = kernels["gelu_mlp"](*arguments), x.new_empty(0), x.new_empty(0)
        else:
            activated = kernels["linear"](x, w1, b1, activation or "gelu", None, None, None)
            out, affine = kernels["linear_fwd"](activated, w2, b2, None, residual, gamma, keep)
            hidden = x.new_empty(0)
        ctx.implementation, ctx.recompute, ctx.activation = implementation, recompute, activation
        *_, of_w1, _, _, _, _, of_gamma, _, _ = ctx.needs_input_grad
        kept_x, kept_b1 = x if of_w1 or ctx.recompute else None, b1 if ctx.recompute else None
        kept_affine = affine if of_gamma else None
        ctx.save_for_backward(kept_x, w1, kept_b1, w2, hidden, kept_affine, gamma, keep)
        ctx.mark_non_differentiable(hidden, affine)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for these
        return out, hidden, affine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        kernels = COMPILED[ctx.implementation]
        x, w1, b1, w2, hidden, affine, gamma, keep = ctx.saved_tensors
        activation, through, rest = ctx.activation, kernels["gelu_mlp_bwd"], (affine, gamma, keep)

        def backward(wanted: list[bool]) -> tuple[Tensor, ...]:
            if not ctx.recompute:
                return through(dout, x, w1, w2, hidden, *rest, wanted, activation)
            first = any(wanted[:3])
            between = None if first else activation or "gelu"
            found = kernels["linear"](x, w1, b1, between, None, None, None)
            if first:
                return through(dout, x, w1, w2, found, *rest, wanted, activation)
            second = [False, *wanted[3:]]
            parts = kernels["linear_bwd"](dout, found, w2, affine, None, gamma, keep, second)
            return (*parts[:1] * 3, *parts[1:])

        found = gradients(ctx, backward, (2, 3, 4, 5, 6, 8))
        found[7] = dout if ctx.needs_input_grad[7] else None
        return tuple(found)


def _train(implementation: str, *arguments: Any, recompute: bool = False) -> Tensor:
    x, w1, b1, w2, b2, residual, gamma, keep, activation = arguments
    if not recompute and not needs_gradient((x, w1, b1)):
        # What lies before the second product is as constant as an input.
        between = activation or "gelu"
        hidden = COMPILED[implementation]["linear"](x, w1, b1, between, None, None, None)
        return train_linear(implementation, hidden, w2, b2, None, residual, gamma, keep)
    if residual is x:  # torch.compile traces no autograd.Function given one tensor twice
        residual = x.view_as(x)
    rest = (w2, b2, residual, gamma, keep, activation)
    return _GeluMlp.apply(implementation, recompute, x, w1, b1, *rest)[0]


def _train_recomputing(implementation: str, *arguments: Any) -> Tensor:
    return _train(implementation, *arguments, recompute=True)


def _reference_recomputing(*arguments: Any) -> Tensor:
    # Nothing in it is random, so no generator state need be kept.
    return checkpoint(reference.gelu_mlp, *arguments, use_reentrant=False, preserve_rng_state=False)


def _sizes(x: object, w1: Tensor, *_: object) -> tuple[int, ...]:
    hidden, width = w1.shape
    return width, hidden


_GELU_MLP = register(
    Operator(
        gelu_mlp,
        reference.gelu_mlp,
        _limits,
        _train,
        constants={7: "keep"},
        sizes=_sizes,
    )
)
_RECOMPUTED = replace(_GELU_MLP, reference=_reference_recomputing, train=_train_recomputing)
