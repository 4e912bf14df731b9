"""Launches of the LayerNorms and RMSNorm that ship, and what of them `deit tune` measures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.layer_norm import reference
from deit.kernels.layer_norm import tiles as layer_norm_tiles
from deit.kernels.layer_norm import triton as layer_norm
from deit.kernels.layer_norm import triton_bwd as layer_norm_bwd
from deit.kernels.prove.launches import TOKENS, Kernel, Shipped, empty, first
from deit.kernels.prove.tuned import Terms, Tuned, gradients


def _layer_norm(shipped: Shipped) -> common.Launch:
    dtype, dim = shipped.torch_dtype, shipped.size
    full, save = shipped.variant != "plain", shipped.operator.endswith("_fwd")
    weight, bias = (empty(dim, dtype=torch.float32 if full else dtype) for _ in range(2))
    wide = shipped.variant == "fp32 rows"
    x = empty(shipped.batch, TOKENS, dim, dtype=torch.float32 if wide else dtype)
    config = layer_norm_tiles.layer_norm(shipped.arch, x.dtype, dim)
    if not shipped.operator.startswith("add"):
        centred = not shipped.operator.startswith("rms")
        return first(
            layer_norm.plan_layer_norm(
                x,
                weight,
                bias if centred else None,
                1e-6,
                centred=centred,
                save=save,
                dtype=dtype if wide else None,
                config=config,
            )
        )
    residual = empty(*x.shape, dtype=torch.float32 if full else dtype)
    gamma, keep = (empty(dim), empty(shipped.batch)) if full else (None, None)
    return first(
        layer_norm.plan_add_layer_norm(
            x, residual, weight, bias, 1e-6, gamma, keep, save=save, config=config
        )
    )


def _layer_norm_bwd(shipped: Shipped) -> common.Launch:
    dtype, dim = shipped.torch_dtype, shipped.size
    full, add = shipped.variant != "plain", shipped.operator.startswith("add")
    wide = torch.float32 if full else dtype
    x = empty(shipped.batch, TOKENS, dim, dtype=dtype)
    total = empty(*x.shape, dtype=wide) if add else x
    rstd = empty(*x.shape[:-1])
    rms = shipped.operator.startswith("rms")
    config = layer_norm_tiles.rms_norm_bwd if rms else layer_norm_tiles.layer_norm_bwd
    gamma, keep = (empty(dim), empty(shipped.batch)) if add and full else (None, None)
    _, launches = layer_norm_bwd.plan(
        x,
        total if add else None,
        x if add else None,
        total,
        empty(dim, dtype=wide),
        None if rms else rstd,
        rstd,
        gamma,
        keep,
        config=config(shipped.arch, dtype, dim),
    )
    return launches[0]


_FORWARD = functools.partial(
    Kernel, config=layer_norm_tiles.layer_norm, build=_layer_norm, products=False
)
_BACKWARD = functools.partial(
    Kernel, config=layer_norm_tiles.layer_norm_bwd, build=_layer_norm_bwd, products=False
)
KERNELS = {
    # "fp32 rows": the last one of a block in autocast.
    "layer_norm": _FORWARD(("plain", "fp32 weights", "fp32 rows")),
    "layer_norm_fwd": _FORWARD(("fp32 weights",)),
    "layer_norm_bwd": _BACKWARD(("plain", "fp32 weights")),
    "rms_norm": _FORWARD(("plain",)),
    "rms_norm_fwd": _FORWARD(("fp32 weights",)),
    "rms_norm_bwd": _BACKWARD(("fp32 weights",)),
    "add_layer_norm": _FORWARD(("plain", "gamma keep fp32")),
    "add_layer_norm_fwd": _FORWARD(("gamma keep fp32",)),
    "add_layer_norm_bwd": _BACKWARD(("plain", "gamma keep fp32")),
}


def tuned(at: Terms) -> Iterator[Tuned]:
    """The forward."""
    yield at.of_call("layer_norm", {"dim": at.size.dim}, layer_norm.layer_norm)


def tuned_bwd(at: Terms) -> Iterator[Tuned]:
    """The backward."""
    dim, eps = at.size.dim, 1e-6
    rows = (at.size.batch, at.size.tokens, dim)
    saved: list[tuple[Tensor, ...]] = []

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias, dout = t
        if not saved:  # the forward is not what is timed
            saved.append(layer_norm.layer_norm_fwd(x, weight, bias, eps)[1:])
        mean, rstd = saved[0]
        planned = layer_norm_bwd.plan(
            dout, None, None, x, weight, mean, rstd, None, None, config=config
        )
        return list(common.written(planned, x)[1:4])

    def plain(t: Sequence[Tensor]) -> list[Tensor]:
        return gradients(lambda x, w, b: reference.layer_norm(x, w, b, eps), t[:3], t[3])

    yield at.of_shapes("layer_norm_bwd", {"dim": dim}, [rows, (dim,), (dim,), rows], run, plain)
