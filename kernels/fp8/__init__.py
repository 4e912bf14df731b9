"""Linear layers and MLPs in 8-bit floating point (e4m3), for inference, where asked for by name.

Weights are rounded to e4m3 once, with a scale an output channel, and kept while they do not change.
Activations are rounded as they pass, with a scale a token and 128 channels. Nothing is calibrated.
Scales are powers of two (`deit.kernels.fp8.quantize`). Sums, LayerNorm, bias, GELU, residual and
LayerScale are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import dispatch, eight_bits
from deit.kernels.engine.operator import Operator, register
from deit.kernels.engine.tracing import constant_when_traced
from deit.kernels.fp8 import reference
from deit.kernels.fp8 import schema as schema
from deit.kernels.gelu_mlp import gelu_mlp
from deit.kernels.layer_norm import layer_norm
from deit.kernels.linear import linear

CAPABILITY = (8, 9)  # the first with matrix products of e4m3


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: eight_bits.Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """residual + gamma * act(LN(x) @ weight.T + bias), the product of factors in e4m3.

    Args:
        x: [..., K], floating point, K at most 65536; kernels take fp32, fp16 and bf16.
        weight: [M, K] and bias: [M] or None, in x's dtype. The weight's e4m3 form is kept between
            calls and made anew when the weight changes (engine/packing.py), and in every replay of
            a CUDA graph.
        norm: LayerNorm's (weight [K], bias [K] or None, eps) to apply to x first, or None. It goes
            to e4m3 from fp32, unrounded.
        activation: None, or "gelu" (exact), which takes neither residual nor gamma.
        residual: [..., M] in x's dtype, or None.
        gamma: [M], LayerScale (arXiv 2103.17239), in x's dtype, or None for 1.
        impl: "auto" (measured on no GPU yet: the reference), "reference", or "triton": compute
            capability 8.9 or later, or Triton's interpreter.

    Returns:
        [..., M] in x's dtype, rounded once. A row with NaN or an infinity is NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: a gradient is wanted; the implementation named by `impl` cannot run.
    """
    arguments = eight_bits.linear_arguments(
        "fp8_linear", x, weight, bias, norm, activation, residual, gamma
    )
    return dispatch.run(_LINEAR, arguments, impl)


def fp8_gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    norm: eight_bits.Norm | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """residual + gamma * (gelu(LN(x) @ w1.T + b1) @ w2.T + b2), both products in e4m3.

    The hidden layer goes to memory in e4m3, quantised from fp32 by the product that makes it.

    Args:
        x: [..., D], floating point; kernels take fp32, fp16 and bf16.
        w1: [M, D], b1: [M] or None, w2: [D', M], b2: [D'] or None, in x's dtype; D and M at most
            65536. Their e4m3 forms are kept as `fp8_linear` keeps its weight's.
        norm: LayerNorm's (weight [D], bias [D] or None, eps) to apply to x first, or None.
        residual: [..., D'] in x's dtype, or None.
        gamma: [D'], LayerScale (arXiv 2103.17239), in x's dtype, or None for 1.
        impl: as for `fp8_linear`.

    Returns:
        [..., D'] in x's dtype, rounded once. GELU is exact.

    Raises:
        As `fp8_linear`.
    """
    arguments = eight_bits.mlp_arguments("fp8_gelu_mlp", x, w1, b1, w2, b2, norm, residual, gamma)
    return dispatch.run(_MLP, arguments, impl)


def why_not(device: torch.device) -> list[str]:
    """Why no kernel of these operators runs on `device`; empty where Triton's does."""
    return [
        *dispatch.environment("triton", device.type, device.index),
        *_too_old(device.type, device.index),
    ]


@constant_when_traced
def _too_old(device_type: str, index: int | None) -> tuple[str, ...]:
    if device_type != "cuda":
        return ()
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= CAPABILITY:
        return ()
    return (f"e4m3 products need compute capability 8.9, this GPU has {major}.{minor}",)


def _limits(implementation: str, x: Tensor, *_: Any) -> list[str]:
    return list(_too_old(x.device.type, x.device.index)) if implementation == "triton" else []


_LINEAR = register(
    Operator(
        fp8_linear,
        reference.fp8_linear,
        _limits,
        sizes=eight_bits.linear_sizes,
        rival=eight_bits.plain_linear(layer_norm, linear),
        eight_bits=True,
    )
)
_MLP = register(
    Operator(
        fp8_gelu_mlp,
        reference.fp8_gelu_mlp,
        _limits,
        sizes=eight_bits.mlp_sizes,
        rival=eight_bits.plain_mlp(layer_norm, gelu_mlp),
        eight_bits=True,
    )
)
