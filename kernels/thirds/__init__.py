"""Operators whose projection to q, k and v lies in three tensors, as in Hugging Face's models.

Each function is the operator of its name, for one weight [3 * D', K] or for three [D', K] whose
biases are three, too, or None. In inference the CPU's kernels read the three where they lie, so no
write to one can be missed and no call copies them. Everything else joins them in the call: the
weights or, where there are fewer rows than the K of each, the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import autocast, dispatch
from deit.kernels.engine.derivatives import has_tangent, needs_gradient
from deit.kernels.engine.operator import OPERATORS, Arguments
from deit.kernels.engine.registry import COMPILED
from deit.kernels.fp8 import fp8_linear as joined_fp8_linear
from deit.kernels.int8 import int8_linear as joined_int8_linear
from deit.kernels.int8 import int8_vit_block as joined_int8_vit_block
from deit.kernels.linear import linear as joined_linear
from deit.kernels.thirds import schema as schema
from deit.kernels.vit_block import vit_block as joined_vit_block

Weight = Tensor | tuple[Tensor, Tensor, Tensor]
Bias = Tensor | tuple[Tensor, Tensor, Tensor] | None

_MULTIPLE = 16  # of each weight's rows, for csrc/cpu/linear.inl


def linear(x: Tensor, weight: Weight, bias: Bias, *, impl: str) -> Tensor:
    """`deit.kernels.linear`: [..., K] -> [..., 3 * D']."""
    if isinstance(weight, Tensor):
        return joined_linear(x, weight, _joined(bias), impl=impl)
    call = _by_thirds("linear", "weight", x, weight, bias, {"bias": _joined(bias)}, impl)
    if call is not None:
        x, _, joined, *_ = call
        return COMPILED["cpu"]["linear_thirds"](x, *weight, joined)
    return _together(joined_linear, x, weight, bias, impl=impl)


def vit_block(
    x: Tensor, *, qkv_weight: Weight, qkv_bias: Bias, impl: str, **rest: Any
) -> tuple[Tensor, Tensor]:
    """`deit.kernels.vit_block`, its other arguments by name."""
    joined = _joined(qkv_bias)
    if not isinstance(qkv_weight, Tensor):
        given = {"qkv_bias": joined, **rest}
        call = _by_thirds("vit_block", "qkv_weight", x, qkv_weight, qkv_bias, given, impl)
        if call is not None:
            x, _, norm_weight, norm_bias, _, *others = call
            return COMPILED["cpu"]["vit_block_thirds"](
                x, norm_weight, norm_bias, *qkv_weight, *others
            )
        qkv_weight = torch.cat(qkv_weight)
    return joined_vit_block(x, qkv_weight=qkv_weight, qkv_bias=joined, impl=impl, **rest)


def rotary_vit_block(
    x: Tensor,
    *,
    qkv_weight: Weight,
    qkv_bias: Bias,
    rope: tuple[Tensor, Tensor, int, bool],
    impl: str,
    **rest: Any,
) -> Tensor | None:
    """`deit.kernels.vit_block` with rotary positions in inference; None where `impl` stands for
    another kernel than the CPU's, which alone has them.

    rope: (sin, cos, prefix, interleaved), as `deit.kernels.rotary_attention` takes them.
    """
    given, name = {"qkv_bias": _joined(qkv_bias), **rest}, "qkv_weight"
    weights: tuple[Tensor | None, ...]
    if isinstance(qkv_weight, tuple):
        weights = qkv_weight
        call = _by_thirds("vit_block", name, x, qkv_weight, qkv_bias, given, impl)
    else:
        weights = (qkv_weight, None, None)
        call = OPERATORS["vit_block"].prepare(x, qkv_weight=qkv_weight, **given)
        if dispatch.choose(OPERATORS["vit_block"], call, impl) != "cpu":
            return None
    if call is None or has_tangent(rope):
        return None
    x, _, norm_weight, norm_bias, _, *between, _, heads, scale, eps, activation = call
    kernel = COMPILED["cpu"]["vit_block_rotary"]
    numbers = (heads, scale, eps, activation)
    return kernel(x, norm_weight, norm_bias, *weights, *between, *rope, *numbers)[0]


def int8_linear(
    x: Tensor, weight: Weight, bias: Bias, *, norm: Any = None, impl: str, **rest: Any
) -> Tensor:
    """`deit.kernels.int8_linear`; for three weights without anything after the product."""
    if isinstance(weight, Tensor):
        return joined_int8_linear(x, weight, _joined(bias), norm=norm, impl=impl, **rest)
    given = {"bias": _joined(bias), "norm": norm, **rest}
    call = _by_thirds("int8_linear", "weight", x, weight, bias, given, impl)
    if call is not None:
        x, _, joined, *normed = call
        return COMPILED["cpu"]["int8_linear_thirds"](x, *weight, joined, *normed[:3])
    return joined_int8_linear(x, torch.cat(weight), _joined(bias), norm=norm, impl=impl, **rest)


def int8_vit_block(
    x: Tensor, *, qkv_weight: Weight, qkv_bias: Bias, impl: str, **rest: Any
) -> Tensor:
    """`deit.kernels.int8_vit_block`, its other arguments by name."""
    joined = _joined(qkv_bias)
    if not isinstance(qkv_weight, Tensor):
        given = {"qkv_bias": joined, **rest}
        call = _by_thirds("int8_vit_block", "qkv_weight", x, qkv_weight, qkv_bias, given, impl)
        if call is not None:
            x, norm_weight, norm_bias, _, *others = call
            return COMPILED["cpu"]["int8_vit_block_thirds"](
                x, norm_weight, norm_bias, *qkv_weight, *others
            )
        qkv_weight = torch.cat(qkv_weight)
    return joined_int8_vit_block(x, qkv_weight=qkv_weight, qkv_bias=joined, impl=impl, **rest)


def fp8_linear(x: Tensor, weight: Weight, bias: Bias, **rest: Any) -> Tensor:
    """`deit.kernels.fp8_linear`; three products for three weights, whose copies are kept."""
    if isinstance(weight, Tensor):
        return joined_fp8_linear(x, weight, _joined(bias), **rest)
    return _apart(joined_fp8_linear, x, weight, bias, **rest)


def _joined(bias: Bias) -> Tensor | None:
    return torch.cat(bias) if isinstance(bias, tuple) else bias


def _stand_in(weight: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A tensor in the joined weight's shape, for the checks; its numbers are never read."""
    (rows, depth), first = weight[0].shape, weight[0].detach()
    return first.as_strided((3 * rows, depth), (0, 1))


def _by_thirds(
    operator: str,
    name: str,
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Bias,
    given: dict[str, Any],
    impl: str,
) -> Arguments | None:
    """The operator's checked arguments where the CPU's kernel takes it by thirds; else None.

    name: what the operator calls the weight, in whose place a stand-in goes. given: the others.
    """
    if torch._C._are_functorch_transforms_active():
        return None
    shape, tensors = weight[0].shape, (x, *weight, *(bias or ()))
    if any(w.shape != shape or w.dtype != x.dtype or w.device != x.device for w in weight):
        return None
    if x.device.type != "cpu" or shape[0] % _MULTIPLE or autocast.dtype_of(x) is not None:
        return None
    if needs_gradient(tensors) or has_tangent(tensors):
        return None
    known = OPERATORS[operator]
    arguments = known.prepare(x, **{name: _stand_in(weight)}, **given)
    return arguments if dispatch.choose(known, arguments, impl) == "cpu" else None


def _together(
    product: Callable[..., Tensor],
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Bias,
    **rest: Any,
) -> Tensor:
    # A comparison of rows would be one of the batch, which a captured graph may leave open.
    if not torch.compiler.is_compiling() and x.numel() < x.shape[-1] ** 2:
        return _apart(product, x, weight, bias, **rest)
    return product(x, torch.cat(weight), _joined(bias), **rest)


def _apart(
    product: Callable[..., Tensor],
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Bias,
    **rest: Any,
) -> Tensor:
    biases = bias if isinstance(bias, tuple) else (bias,) * 3
    pairs = zip(weight, biases, strict=True)
    return torch.cat([product(x, w, b, **rest) for w, b in pairs], dim=-1)
