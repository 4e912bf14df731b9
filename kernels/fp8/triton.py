"""`deit.kernels.fp8_linear` and `fp8_gelu_mlp` on Triton: rows to e4m3, then the products.

The weights' e4m3 forms are kept by `deit.kernels.engine.packing`. fc1 writes its output as fc2
reads it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.device import common, launching
from deit.kernels.engine.packing import packed
from deit.kernels.fp8 import triton_product as fp8_product
from deit.kernels.fp8 import triton_rows as fp8_rows
from deit.kernels.fp8.quantize import E4M3, GROUP, quantize
from deit.kernels.fp8.triton_product import Weight


def fp8_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """`deit.kernels.fp8_linear`; x and residual as `linear` takes them (`common.as_rows`)."""
    return _linear(x, *kept(weight), *rest)


@launching.kept
def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Tensor:
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    rows = _rows(x, norm_weight, norm_bias, eps)
    weights, activation = Weight(weight, weight_scales), "gelu" if gelu else None
    launch = fp8_product.plan(rows, weights, bias, activation, residual, gamma, out)
    return common.written((out, launch), x)


def fp8_gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any) -> Tensor:
    """`deit.kernels.fp8_gelu_mlp`; the hidden layer is in memory as e4m3, 1 byte a channel."""
    return _gelu_mlp(x, *kept(w1), b1, *kept(w2), *rest)


@launching.kept
def _gelu_mlp(
    x: Tensor,
    w1: Tensor,
    w1_scales: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    w2_scales: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Tensor:
    out = torch.empty((*x.shape[:-1], w2.shape[0]), dtype=x.dtype, device=x.device)
    rows = _rows(x, norm_weight, norm_bias, eps)
    hidden = common.written(fp8_product.plan_hidden(rows, Weight(w1, w1_scales), b1), x)
    launch = fp8_product.plan(hidden, Weight(w2, w2_scales), b2, None, residual, gamma, out)
    return common.written((out, launch), x)


def kept(weight: Tensor) -> Weight:
    """The e4m3 form of a weight [M, K], made once while the weight does not change."""
    return packed(weight, "fp8", pack)


def pack(weight: Tensor) -> Weight:
    """Round a weight [M, K] to e4m3 by output channel, padded with zeros to whole groups."""
    e4m3, scales = quantize(weight, weight.shape[1])
    padded = F.pad(e4m3.view(torch.uint8), (0, -weight.shape[1] % GROUP)).view(E4M3)
    return Weight(padded.contiguous(), scales.flatten().contiguous())


def _rows(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> fp8_rows.Rows:
    norm = None if norm_weight is None else fp8_rows.Norm(norm_weight, norm_bias, eps)
    return common.written(fp8_rows.plan(x, norm), x)
