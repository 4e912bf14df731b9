"""Launches of the products in e4m3 that ship, and what of them `deit tune` measures.

Their rows are made once, because making them is not what is timed. fp8's reference says what is
right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels import fp8
from deit.kernels.device import common, tuning
from deit.kernels.fp8 import reference
from deit.kernels.fp8 import tiles as fp8_tiles
from deit.kernels.fp8 import triton_product as fp8_product
from deit.kernels.fp8 import triton_rows as fp8_rows
from deit.kernels.fp8.quantize import E4M3, GROUP, quantize, rounded
from deit.kernels.fp8.triton import kept
from deit.kernels.layer_norm import tiles as layer_norm_tiles
from deit.kernels.prove.launches import TOKENS, Kernel, Shipped, empty
from deit.kernels.prove.tuned import Terms, Tuned


def _rows(shipped: Shipped) -> common.Launch:
    dtype, dim = shipped.torch_dtype, shipped.size
    weight, bias = (empty(dim, dtype=dtype) for _ in range(2))
    norm = fp8_rows.Norm(weight, bias, 1e-6) if shipped.variant == "norm" else None
    chosen = layer_norm_tiles.layer_norm(shipped.arch, dtype, dim)
    _, launch = fp8_rows.plan(empty(shipped.batch, TOKENS, dim, dtype=dtype), norm, config=chosen)
    assert launch is not None  # no case is empty
    return launch


def _product(shipped: Shipped) -> common.Launch:
    dtype, dim = shipped.torch_dtype, shipped.size
    width = dim + 1 if "unaligned" in shipped.variant else dim  # which a descriptor cannot take
    x = fp8_rows.empty(shipped.batch * TOKENS, dim, torch.device("meta"))
    padded = -(-dim // GROUP) * GROUP
    weight = fp8_product.Weight(empty(width, padded, dtype=E4M3), empty(width))
    bias, hidden = empty(width, dtype=dtype), shipped.variant == "hidden"
    chosen = fp8_tiles.fp8_product(shipped.arch, E4M3 if hidden else dtype, width, padded)
    if hidden:
        _, launch = fp8_product.plan_hidden(x, weight, bias, config=chosen)
    else:
        out = empty(shipped.batch, TOKENS, width, dtype=dtype)
        full = "residual" in shipped.variant
        residual, gamma = (out, empty(width, dtype=dtype)) if full else (None, None)
        activation = "gelu" if shipped.variant == "gelu" else None
        launch = fp8_product.plan(x, weight, bias, activation, residual, gamma, out, config=chosen)
    assert launch is not None
    return launch


def _there(arch: int) -> bool:
    return arch >= 10 * fp8.CAPABILITY[0] + fp8.CAPABILITY[1]


def _rows_config(arch: int, dtype: torch.dtype, size: int) -> object:
    return layer_norm_tiles.layer_norm(arch, dtype, size) if _there(arch) else None


def _config(arch: int, dtype: torch.dtype, size: int) -> object:
    """The product's configurations, for the result's dtype and for the hidden layer's."""
    kinds = (dtype, E4M3)
    found = tuple(fp8_tiles.fp8_product(arch, kind, size, size) for kind in kinds)
    return found if _there(arch) else None


KERNELS = {
    "fp8_rows": Kernel(("plain", "norm"), _rows_config, _rows, products=False),
    # Factors in e4m3 suit a descriptor whatever the width.
    "fp8_product": Kernel(("bias", "gelu", "hidden", "residual gamma", "unaligned residual gamma"),
                          _config, _product, tiled=True, pointers=(), eight_bits=True),
}  # fmt: skip


def tuned(at: Terms) -> Iterator[Tuned]:
    """fc1, fc2, qkv and proj of one network; none where the device has no products of e4m3."""
    dim = at.size.dim
    if fp8.why_not(at.device):
        return
    yield _tuned_hidden(at)
    for width, depth in ((dim, 4 * dim), (3 * dim, dim), (dim, dim)):
        yield _tuned_linear(at, width, depth)


def _sizes(width: int, depth: int) -> dict[str, int]:
    return {"width": width, "depth": -(-depth // GROUP) * GROUP}


class _Made:
    """x in e4m3, made when first asked for."""

    def __init__(self) -> None:
        self.made: fp8_rows.Rows | None = None

    def __call__(self, x: Tensor) -> fp8_rows.Rows:
        if self.made is None:
            self.made, launch = fp8_rows.plan(x, None)
            _run(launch, x)
        return self.made


def _run(launch: common.Launch | None, like: Tensor) -> None:
    assert launch is not None  # none is empty
    launch.run(like)


def _tuned_linear(at: Terms, width: int, depth: int) -> Tuned:
    """With the residual where a block adds it."""
    rows, tokens = _Made(), (at.size.batch, at.size.tokens)
    shapes: list[tuple[int, ...]] = [(*tokens, depth), (width, depth), (width,)]
    if width == at.size.dim:
        shapes.append((*tokens, width))

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias, *residual = t
        out = x.new_empty((*x.shape[:-1], width))
        added = residual[0] if residual else None
        _run(
            fp8_product.plan(rows(x), kept(weight), bias, None, added, None, out, config=config), x
        )
        return [out]

    def plain(t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias, *residual = t
        added = residual[0] if residual else None
        return [reference.fp8_linear(x, weight, bias, None, None, 0.0, False, added, None)]

    return at.of_shapes("fp8_product", _sizes(width, depth), shapes, run, plain)


def _tuned_hidden(at: Terms) -> Tuned:
    """fc1, which writes e4m3, compared in units of its scales. In fp64 those are not rounded to.

    So the rule allows a kernel the error of the rounding itself, and a quarter more.
    """
    dim, rows = at.size.dim, _Made()
    shapes = [(at.size.batch, at.size.tokens, dim), (4 * dim, dim), (4 * dim,)]

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias = t
        out, launch = fp8_product.plan_hidden(rows(x), kept(weight), bias, config=config)
        _run(launch, x)
        return [out.e4m3.view(*x.shape[:-1], -1)]

    def plain(t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias = t
        y = F.gelu(F.linear(rounded(x, GROUP), rounded(weight, dim), bias.float()))
        e4m3, scales = quantize(y, GROUP)
        if x.dtype != torch.float64:
            return [e4m3]
        blocks = F.pad(y, (0, -y.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
        return [(blocks / scales[..., None]).flatten(-2).double()]

    named = tuning.TUNABLE["fp8_product"].arguments(at.arch, E4M3, **_sizes(4 * dim, dim))
    made = at.of_shapes("fp8_product", _sizes(4 * dim, dim), shapes, run, plain)
    return dataclasses.replace(made, arguments=named)
