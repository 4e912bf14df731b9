"""LayerNorm, alone and fused with the residual addition before it, and RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import dispatch, validate
from deit.kernels.engine.derivatives import gradients, once_differentiable
from deit.kernels.engine.operator import Operator, register
from deit.kernels.engine.registry import COMPILED
from deit.kernels.layer_norm import reference
from deit.kernels.layer_norm import schema as schema


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm over the last axis (arXiv 1607.06450).

    Args:
        x: [..., D], fp32, fp16 or bf16 (fp64 by the reference).
        weight, bias: [D], in x's dtype or fp32; bias may be None.
        eps: added to the variance. timm and the official DeiT use 1e-6, Hugging Face 1e-12.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [..., D] in x's dtype. Mean and variance are fp32 whatever the dtype, also under
        autocast, which leaves x as it is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: the implementation named by `impl` cannot run, with each reason.
    """
    eps = _check(x, weight, bias, eps)
    return dispatch.run(_LAYER_NORM, (x, weight, bias, eps), impl)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual addition and the LayerNorm that follows it, in one pass.

    Args:
        x: [..., D], the branch's output.
        residual: the stream it joins, x's shape, in x's dtype or fp32.
        weight, bias, eps: as for `layer_norm`.
        gamma: [D], LayerScale (arXiv 2103.17239), or None for 1.
        keep: [B], stochastic depth's factor for each sample, 0 or 1/(1 - p), or None for 1.
        impl: as for `layer_norm`.

    Returns:
        (LN(s), s) with s = residual + keep * gamma * x; LN(s) in x's dtype, s in residual's.

    Raises:
        As `layer_norm`.
    """
    eps = _check(x, weight, bias, eps)
    validate.tensor("residual", residual)
    validate.epilogue(x, x.shape[-1], residual, gamma, keep)
    return dispatch.run(_ADD_LAYER_NORM, (x, residual, weight, bias, eps, gamma, keep), impl)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, impl: str = "auto") -> Tensor:
    """RMSNorm over the last axis (arXiv 1910.07467): x / sqrt(mean(x * x) + eps) * weight.

    Args:
        x: [..., D], fp32, fp16 or bf16 (fp64 by the reference).
        weight: [D], in x's dtype or fp32.
        eps: added to the mean square. timm uses 1e-6 or 1e-5; torch.nn.RMSNorm's default is the
            machine epsilon of x's dtype.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        [..., D] in x's dtype. The mean square is fp32 whatever the dtype, also under autocast,
        which leaves x as it is.

    Raises:
        As `layer_norm`.
    """
    eps = _check(x, weight, None, eps)
    return dispatch.run(_RMS_NORM, (x, weight, eps), impl)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> float:
    """eps as a float; the others are what LayerNorm takes."""
    validate.tensor("x", x)
    shape = x.shape[-1:]
    validate.parameters(x, ("weight", weight, shape), fp32_allowed=True)
    if bias is not None:
        validate.parameters(weight, ("bias", bias, shape))
    eps = validate.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected a number >= 0; got {eps}")
    return eps


class _LayerNorm(torch.autograd.Function):
    """Differentiates by an implementation's `layer_norm_fwd` and `layer_norm_bwd`."""

    @staticmethod
    def forward(
        ctx: Any, implementation: str, x: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = COMPILED[implementation]["layer_norm_fwd"](x, weight, *rest)
        ctx.implementation = implementation
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for mean and rstd
        return out, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        kernel = COMPILED[ctx.implementation]["layer_norm_bwd"]
        saved = ctx.saved_tensors
        return tuple(gradients(ctx, lambda wanted: kernel(dout, *saved, wanted), (1, 2, 3)))


class _AddLayerNorm(torch.autograd.Function):
    """Differentiates by an implementation's `add_layer_norm_fwd` and `add_layer_norm_bwd`."""

    @staticmethod
    def forward(
        ctx: Any, implementation: str, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, total, mean, rstd = COMPILED[implementation]["add_layer_norm_fwd"](*arguments)
        x, _, weight, _, _, gamma, keep = arguments
        ctx.implementation = implementation
        of_gamma = ctx.needs_input_grad[6]
        ctx.save_for_backward(x if of_gamma else None, total, weight, mean, rstd, gamma, keep)
        ctx.dtype = x.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for mean and rstd
        return out, total, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dtotal: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        kernel, saved = COMPILED[ctx.implementation]["add_layer_norm_bwd"], ctx.saved_tensors
        total = saved[1]
        douts = (
            torch.zeros_like(total, dtype=ctx.dtype) if dout is None else dout,
            torch.zeros_like(total) if dtotal is None else dtotal,
        )

        def backward(wanted: list[bool]) -> tuple[Tensor, ...]:
            return kernel(*douts, *saved, wanted)

        return tuple(gradients(ctx, backward, (1, 2, 3, 4, 6)))


class _RmsNorm(torch.autograd.Function):
    """Differentiates by an implementation's `rms_norm_fwd` and `rms_norm_bwd`."""

    @staticmethod
    def forward(
        ctx: Any, implementation: str, x: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, rstd = COMPILED[implementation]["rms_norm_fwd"](x, weight, eps)
        ctx.implementation = implementation
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for rstd
        return out, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        kernel = COMPILED[ctx.implementation]["rms_norm_bwd"]
        saved = ctx.saved_tensors
        return tuple(gradients(ctx, lambda wanted: kernel(dout, *saved, wanted), (1, 2)))


def _train(implementation: str, *arguments: Any) -> Tensor:
    return _LayerNorm.apply(implementation, *arguments)[0]


def _train_add(implementation: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _AddLayerNorm.apply(implementation, *arguments)[:2]


def _train_rms(implementation: str, *arguments: Any) -> Tensor:
    return _RmsNorm.apply(implementation, *arguments)[0]


def _sizes(x: object, weight: Tensor, *_: object) -> tuple[int, ...]:
    return tuple(weight.shape)


def _add_sizes(x: object, residual: object, weight: Tensor, *_: object) -> tuple[int, ...]:
    return tuple(weight.shape)


_LAYER_NORM = register(Operator(layer_norm, reference.layer_norm, train=_train, sizes=_sizes))
_RMS_NORM = register(Operator(rms_norm, reference.rms_norm, train=_train_rms, sizes=_sizes))
_ADD_LAYER_NORM = register(
    Operator(
        add_layer_norm,
        reference.add_layer_norm,
        train=_train_add,
        constants={6: "keep"},
        sizes=_add_sizes,
    )
)
