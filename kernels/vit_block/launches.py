"""Launches that vit_block alone has and that ship, and what of it `deit tune` measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.gelu_mlp import triton as gelu_mlp
from deit.kernels.layer_norm import reference as layer_norm_reference
from deit.kernels.layer_norm import tiles as layer_norm_tiles
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.linear import reference as linear_reference
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as linear
from deit.kernels.linear import triton_norm_linear as norm_linear
from deit.kernels.linear import triton_row_stats as row_stats
from deit.kernels.prove.launches import TOKENS, Kernel, Shipped, empty, first, square
from deit.kernels.prove.tuned import Terms, Tuned


def _stream(shipped: Shipped) -> Tensor:
    """[B, N, D]; where descriptors shall not take it, its rows are off 16 bytes."""
    dtype = torch.float32 if "fp32" in shipped.variant else shipped.torch_dtype
    spare = 1 if "unaligned" in shipped.variant else 0
    return empty(shipped.batch, TOKENS, shipped.size + spare, dtype=dtype)[..., : shipped.size]


def _norm(x: Tensor) -> row_stats.Norm:
    weight, bias = (empty(x.shape[-1], dtype=x.dtype) for _ in range(2))
    return row_stats.Norm(row_stats.empty(x), weight, bias, 1e-6)


def _parameters(shipped: Shipped, width: int, depth: int) -> tuple[Tensor, Tensor]:
    dtype = shipped.torch_dtype
    return empty(width, depth, dtype=dtype), empty(width, dtype=dtype)


def _row_stats(shipped: Shipped) -> common.Launch:
    chosen = layer_norm_tiles.layer_norm(shipped.arch, shipped.torch_dtype, shipped.size)
    return first(row_stats.plan(_stream(shipped), config=chosen))


def _norm_panel(shipped: Shipped) -> common.Launch:
    x, dim = _stream(shipped), shipped.size
    activation = next((word for word in shipped.variant.split() if word in ACTIVATIONS), None)
    parameters = _parameters(shipped, dim, dim)
    panel = linear_tiles.norm_panel(shipped.arch, shipped.torch_dtype, dim, dim)
    assert panel is not None  # `shipped` leaves these out
    return first(norm_linear.plan(x, _norm(x), *parameters, activation, config=panel))


def _linear_stats(shipped: Shipped) -> common.Launch:
    residual, dim = _stream(shipped), shipped.size
    x = empty(shipped.batch, TOKENS, dim, dtype=shipped.torch_dtype)
    if "unaligned" in shipped.variant:
        x = empty(shipped.batch, TOKENS, dim + 1, dtype=shipped.torch_dtype)[..., :dim]
    gamma = empty(dim) if "gamma" in shipped.variant else None
    chosen = linear_tiles.linear(shipped.arch, shipped.torch_dtype, dim, dim)
    parameters = _parameters(shipped, dim, dim)
    stats = row_stats.empty(residual)
    planned = linear.plan(
        x, *parameters, None, residual, gamma, None, row_stats=stats, config=chosen
    )
    return first(planned)


def _norm_mlp(shipped: Shipped) -> common.Launch:
    x, dim = _stream(shipped), shipped.size
    products = (*_parameters(shipped, 4 * dim, dim), *_parameters(shipped, dim, 4 * dim))
    gamma = empty(dim) if "gamma" in shipped.variant else None
    chosen = gelu_mlp_tiles.gelu_mlp(shipped.arch, shipped.torch_dtype, dim)
    assert chosen is not None  # `shipped` leaves these out
    stats = row_stats.empty(x)
    activation = next((word for word in shipped.variant.split() if word in ACTIVATIONS), "gelu")
    planned = gelu_mlp.plan(
        x, *products, x, gamma, None, activation, norm=_norm(x), row_stats=stats, config=chosen
    )
    return first(planned)


KERNELS = {
    "row_stats": Kernel(("plain",), layer_norm_tiles.layer_norm, _row_stats, products=False),
    "norm_panel": Kernel(("plain", "fp32 gelu", *ACTIVATIONS[1:]),
                         square(linear_tiles.norm_panel), _norm_panel, tiled=True),
    "linear_stats": Kernel(("plain", "fp32 gamma", "fp32 gamma unaligned"),
                           square(linear_tiles.linear), _linear_stats, tiled=True),
    "norm_mlp": Kernel(("plain", "fp32 gamma", *ACTIVATIONS[1:]),
                       gelu_mlp_tiles.gelu_mlp, _norm_mlp, tiled=True),
}  # fmt: skip


def tuned(at: Terms) -> Iterator[Tuned]:
    """LayerNorm before fc1 and before qkv, in the product's kernel or in one of its own (None)."""
    for width, activation in ((at.size.hidden, "gelu"), (3 * at.size.dim, None)):
        yield _tuned_panel(at, width, activation)


def _tuned_panel(at: Terms, width: int, activation: str | None) -> Tuned:
    """LayerNorm and a product: in one kernel, its rows' statistics given, or in two (None)."""
    depth, saved = at.size.dim, []  # type: int, list[Tensor]
    sizes = {"width": width, "depth": depth}

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias, norm_weight, norm_bias = t
        if not saved:  # what the product before writes is not what is timed
            saved.append(row_stats.row_stats(x))
        given = row_stats.Norm(saved[0], norm_weight, norm_bias, 1e-6)
        return [norm_linear.norm_linear(x, given, weight, bias, activation, config=config)]

    def plain(t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias, norm_weight, norm_bias = t
        normed = layer_norm_reference.layer_norm(x, norm_weight, norm_bias, 1e-6)
        return [linear_reference.linear(normed, weight, bias, activation, None, None, None)]

    rows = (at.size.batch, at.size.tokens, depth)
    shapes: list[tuple[int, ...]] = [rows, (width, depth), (width,), (depth,), (depth,)]
    return at.of_shapes("norm_panel", sizes, shapes, run, plain)
