"""Launches of the products that ship, and what of them `deit tune` measures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton as linear
from deit.kernels.linear import triton_bwd as linear_bwd
from deit.kernels.linear import triton_gradients as products
from deit.kernels.prove import calls
from deit.kernels.prove.launches import TOKENS, Kernel, Shipped, empty, epilogue, first, square
from deit.kernels.prove.tuned import Terms, Tuned, gradients


def _activation(shipped: Shipped) -> str | None:
    """The one that a variant begins with, or ends with behind "through"."""
    return next((word for word in shipped.variant.split() if word in ACTIVATIONS), None)


def _linear(shipped: Shipped) -> common.Launch:
    dtype, dim = shipped.torch_dtype, shipped.size
    x = empty(shipped.batch, TOKENS, dim, dtype=dtype)
    if "unaligned" in shipped.variant:  # "all": nor is the number of rows a multiple of 16
        batch = shipped.batch + ("all" in shipped.variant)
        x = empty(batch, TOKENS, dim + 1, dtype=dtype)[..., :dim]
    elif shipped.variant == "token slice":
        x = empty(shipped.batch, TOKENS + 1, dim, dtype=dtype)[:, 1:]
    weight, bias = empty(dim, dim, dtype=dtype), empty(dim, dtype=dtype)
    activation = _activation(shipped)
    options = epilogue(shipped, x.shape)
    if "all unaligned" in shipped.variant:
        weight = empty(dim, dim + 1, dtype=dtype)[:, :dim]
        options = (x, *options[1:])
    config = linear_tiles.linear(shipped.arch, dtype, dim, dim)
    affine = empty(*x.shape, dtype=dtype) if shipped.operator == "linear_fwd" else None
    return first(linear.plan(x, weight, bias, activation, *options, affine=affine, config=config))


def _few_rows(shipped: Shipped) -> tuple[common.Launch, ...]:
    """By the tile that a variant begins with; the parts and their sum if it names their number."""
    dtype, dim = shipped.torch_dtype, shipped.size
    tile, splits, *words = shipped.variant.split()
    height, columns = (64, 64) if dtype == torch.float32 else map(int, tile.split("x"))
    config = next(
        config
        for config in linear_tiles.for_few_rows(shipped.arch, dtype, dim, 4 * dim, 256, 132)
        if (config.block_m, config.block_n, config.splits) == (height, columns, int(splits))
    )
    spare = 1 if "unaligned" in words else 0
    x = empty(shipped.batch, TOKENS, 4 * dim + spare, dtype=dtype)[..., : 4 * dim]
    weight, bias = empty(dim, 4 * dim, dtype=dtype), empty(dim, dtype=dtype)
    options = epilogue(shipped, x.shape[:-1] + weight.shape[:1])
    affine = empty(*x.shape[:-1], dim, dtype=dtype) if "training" in words else None
    activation = _activation(shipped)
    return linear.plan(x, weight, bias, activation, *options, affine=affine, config=config)[1]


def _output_gradient(shipped: Shipped) -> common.Launch:
    dtype, dim = shipped.torch_dtype, shipped.size
    dout = empty(
        shipped.batch, TOKENS, dim, dtype=torch.float32 if "fp32" in shipped.variant else dtype
    )
    affine = empty(*dout.shape, dtype=dtype)
    activation = _activation(shipped)
    _, gamma, keep = epilogue(shipped, dout.shape)
    return first(linear_bwd.plan(dout, dtype, affine, activation, gamma, keep))


def _spaced(shipped: Shipped) -> Tensor:
    """[T, D]; where descriptors shall not take it, its rows are off 16 bytes."""
    spare = 1 if "unaligned" in shipped.variant else 0
    rows = empty(shipped.batch * TOKENS, shipped.size + spare, dtype=shipped.torch_dtype)
    return rows[:, : shipped.size]


def _input_gradient(shipped: Shipped) -> common.Launch:
    g, dtype, size, activation = (
        _spaced(shipped),
        shipped.torch_dtype,
        shipped.size,
        _activation(shipped),
    )
    weight, through = empty(size, size, dtype=dtype), activation is not None
    hidden = empty(*g.shape, dtype=dtype) if through else None
    config = linear_tiles.input_gradient(shipped.arch, dtype, size, size, gelu=through)
    activation = activation or "gelu"
    return first(products.plan_input_gradient(g, weight, hidden, activation, config=config))


def _weight_gradient(shipped: Shipped) -> common.Launch:
    g, dtype = _spaced(shipped), shipped.torch_dtype
    x = empty(shipped.batch, TOKENS + 1, shipped.size, dtype=dtype)[:, 1:]
    if shipped.variant != "token slice":
        x = empty(shipped.batch, TOKENS, shipped.size, dtype=dtype)
    config = linear_tiles.weight_gradient(shipped.arch, dtype, shipped.size, shipped.size)
    programs = 1 if shipped.variant == "one part" else 132
    return first(products.plan_weight_gradient(g, x, config=config, programs=programs))


def _both(arch: int, dtype: torch.dtype, size: int) -> object:
    """Both forms, so that each of its configurations is compiled."""
    both = (False, True)
    return tuple(linear_tiles.input_gradient(arch, dtype, size, size, gelu=gelu) for gelu in both)


_TILES = ("64x64", "64x128", "128x64", "128x128")
_EPILOGUES = ("gelu training", "fp32 residual gamma keep")


def _whatever(arch: int, dtype: torch.dtype, size: int) -> object:
    return arch, dtype


KERNELS = {
    "linear": Kernel(
        ("bias", *ACTIVATIONS, "residual", "residual gamma keep", "fp32 residual",
         "unaligned", "token slice"), square(linear_tiles.linear), _linear, tiled=True),
    "linear_fwd": Kernel((*ACTIVATIONS, "fp32 residual gamma keep", "gelu unaligned",
                          "gelu residual gamma keep all unaligned"),
                         square(linear_tiles.linear), _linear, tiled=True),
    # What few rows run: a tile, the number of parts that a sum is cut into, an epilogue.
    "linear_few": Kernel((*(f"{tile} 1 {words}" for tile in _TILES for words in _EPILOGUES),
                          "64x64 1 gelu", "64x64 1 gelu unaligned"),
                         _whatever, lambda shipped: _few_rows(shipped)[0], (384,)),
    "linear_parts": Kernel((*(f"{tile} 4" for tile in _TILES), "64x64 4 unaligned"),
                           _whatever, lambda shipped: _few_rows(shipped)[0], (384,)),
    "linear_sum": Kernel(("64x64 2 gelu", "64x64 12 fp32 residual gamma keep",
                          "64x64 12 residual", "64x64 12 gelu training"),
                         _whatever, lambda shipped: _few_rows(shipped)[1], (384,), products=False),
    # The three kernels of linear's and gelu_mlp's backward.
    "output_gradient": Kernel(
        ("sums only", "gelu", "gelu_tanh gamma keep", "quick_gelu", "silu", "fp32 gamma keep"),
        lambda arch, dtype, size: linear_tiles.output_gradient(size),
        _output_gradient, tiled=True, products=False),
    "input_gradient": Kernel(("plain", *(f"through {name}" for name in ACTIVATIONS), "unaligned",
                              "through gelu unaligned"), _both, _input_gradient, tiled=True),
    "weight_gradient": Kernel(("plain", "one part", "unaligned", "token slice"),
                              square(linear_tiles.weight_gradient), _weight_gradient, tiled=True),
}  # fmt: skip


def _products(at: Terms) -> Iterator[tuple[int, int, str | None]]:
    """(output channels, summed ones, activation) of fc1, fc2, qkv and proj."""
    dim, hidden = at.size.dim, at.size.hidden
    yield from ((hidden, dim, "gelu"), (dim, hidden, None), (3 * dim, dim, None), (dim, dim, None))


def tuned(at: Terms) -> Iterator[Tuned]:
    """The four products of a block, with the residual where a block adds it."""
    for width, depth, activation in _products(at):
        form = "inference" if width == at.size.dim else "least"
        options = {"activation": activation}
        build = functools.partial(_product, form=form, options=options)
        size = replace(at.size, dim=depth, width=width)
        sizes = {"width": width, "depth": depth, "rows": at.rows}
        sizes["multiprocessors"] = at.multiprocessors
        yield replace(at, size=size).of_call("linear", sizes, linear.linear, build)


def _product(draw: calls.Draw, size: calls.Size, form: str, options: dict[str, Any]) -> calls.Call:
    return replace(calls.build("linear", draw, size, form), options=options)


def tuned_bwd(at: Terms) -> Iterator[Tuned]:
    """The gradients of the same products; that of fc2's input goes through fc1's GELU."""
    for width, depth, _ in _products(at):
        yield _tuned_input(at, width=depth, depth=width, gelu=depth == at.size.hidden)
        yield _tuned_weight(at, width, depth)


def _tuned_input(at: Terms, width: int, depth: int, gelu: bool) -> Tuned:
    """`width` input channels; through fc1's GELU where `gelu`."""
    rows = at.size.batch * at.size.tokens

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        g, weight, *hidden = t
        g = g.view(rows, depth)
        if gelu:
            found = products.hidden_gradient(g, weight, hidden[0].view(rows, width),
                                                 config=config)  # fmt: skip
            return list(found[:2])
        return [products.input_gradient(g, weight, config=config)]

    def plain(t: Sequence[Tensor]) -> list[Tensor]:
        dout = t[0].view(rows, depth) @ t[1]
        if not gelu:
            return [dout]
        hidden = t[2].view(rows, width)
        return [*gradients(F.gelu, [hidden], dout), F.gelu(hidden)]

    shapes: list[tuple[int, ...]] = [(rows, 1, depth), (depth, width)]
    return at.of_shapes(
        "input_gradient",
        {"width": width, "depth": depth, "gelu": gelu},
        [*shapes, (rows, 1, width)] if gelu else shapes,
        run,
        plain,
    )


def _tuned_weight(at: Terms, width: int, depth: int) -> Tuned:
    rows = (at.size.batch, at.size.tokens)
    flat = lambda t: t.view(-1, t.shape[-1])
    return at.of_shapes(
        "weight_gradient",
        {"width": width, "depth": depth},
        [(*rows, width), (*rows, depth)],
        lambda config, t: [products.weight_gradient(flat(t[0]), t[1], config=config)],
        lambda t: [flat(t[0]).T @ flat(t[1])],
    )
