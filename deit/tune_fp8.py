"""The products in e4m3 for `deit tune`, beside those of `tune_problems`.

Their rows are made once: what makes them is not what is timed. Right is what fp8's reference says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels import fp8
from deit.kernels.device import common
from deit.kernels.engine import tuning
from deit.kernels.fp8 import triton_product as fp8_product
from deit.kernels.fp8 import triton_rows as fp8_rows
from deit.kernels.fp8.quantize import E4M3, GROUP, quantize, rounded
from deit.kernels.fp8.triton import kept
from deit.kernels.prove import reference

if TYPE_CHECKING:
    from deit.tune_problems import Problem, Size


def problems(size: Size) -> Iterator[Problem]:
    """fc1, fc2, qkv and proj of one network; none where the device has no products of e4m3."""
    dim = size.network.embed_dim
    if fp8.why_not(size.device):
        return
    yield _hidden(size)
    for width, depth in ((dim, 4 * dim), (3 * dim, dim), (dim, dim)):
        yield _linear(size, width, depth)


def _sizes(width: int, depth: int) -> dict[str, int]:
    return {"width": width, "depth": -(-depth // GROUP) * GROUP}


class _Rows:
    """x in e4m3, made when first asked for."""

    def __init__(self) -> None:
        self.made: fp8_rows.Rows | None = None

    def __call__(self, x: Tensor) -> fp8_rows.Rows:
        if self.made is None:
            self.made, launch = fp8_rows.plan(x, None)
            _run(launch, x)
        return self.made


def _run(launch: common.Launch | None, like: Tensor) -> None:
    assert launch is not None  # no problem is empty
    launch.run(like)


def _linear(size: Size, width: int, depth: int) -> Problem:
    """With the residual where a block adds it."""
    rows, tokens = _Rows(), (size.batch, size.network.tokens)
    shapes: list[tuple[int, ...]] = [(*tokens, depth), (width, depth), (width,)]
    if width == size.network.embed_dim:
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

    return size.problem("fp8_product", _sizes(width, depth), shapes, run, plain)


def _hidden(size: Size) -> Problem:
    """fc1, which writes e4m3: compared in units of its scales, which in fp64 are not rounded in.

    So the rule allows a kernel the error of the rounding itself, and a quarter.
    """
    dim, rows = size.network.embed_dim, _Rows()
    shapes = [(size.batch, size.network.tokens, dim), (4 * dim, dim), (4 * dim,)]

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

    named = tuning.TUNABLE["fp8_product"].arguments(size.arch, E4M3, **_sizes(4 * dim, dim))
    made = size.problem("fp8_product", _sizes(4 * dim, dim), shapes, run, plain)
    return dataclasses.replace(made, arguments=named)
