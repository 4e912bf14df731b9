"""The launches of vit_block that no other operator has, for `cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deit.kernels.device import common, configs
from deit.kernels.gelu_mlp import triton as gelu_mlp
from deit.kernels.linear import triton as linear
from deit.kernels.linear import triton_norm_linear as norm_linear
from deit.kernels.linear import triton_row_stats as row_stats

if TYPE_CHECKING:
    from deit.kernels.prove.cases import Case

_TOKENS = 197

VARIANTS: dict[str, tuple[str, ...]] = {
    "row_stats": ("plain",),
    "norm_panel": ("plain", "fp32 gelu"),
    "linear_stats": ("plain", "fp32 gamma", "fp32 gamma unaligned"),
    "norm_mlp": ("plain", "fp32 gamma"),
}
# Compiled for a tile and not for a width.
TILED = ("norm_panel", "linear_stats", "norm_mlp")


def config(operator: str, arch: int, dtype: torch.dtype, size: int) -> object:
    """What, beside the size, the kernels of an operator are compiled for; None for no kernel."""
    if operator == "row_stats":
        return configs.layer_norm(arch, dtype, size)
    if operator == "norm_mlp":
        return configs.gelu_mlp(arch, dtype, size)
    name = "linear" if operator == "linear_stats" else operator
    return getattr(configs, name)(arch, dtype, size, size)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _stream(case: Case) -> Tensor:
    """[B, N, D]; where descriptors shall not take it, its rows are off 16 bytes."""
    dtype = torch.float32 if "fp32" in case.variant else case.torch_dtype
    spare = 1 if "unaligned" in case.variant else 0
    return _empty(case.batch, _TOKENS, case.size + spare, dtype=dtype)[..., : case.size]


def _norm(x: Tensor) -> row_stats.Norm:
    weight, bias = (_empty(x.shape[-1], dtype=x.dtype) for _ in range(2))
    return row_stats.Norm(row_stats.empty(x), weight, bias, 1e-6)


def _parameters(case: Case, width: int, depth: int) -> tuple[Tensor, Tensor]:
    dtype = case.torch_dtype
    return _empty(width, depth, dtype=dtype), _empty(width, dtype=dtype)


def _launch(planned: tuple[object, common.Launch | None] | None) -> common.Launch:
    assert planned is not None
    assert planned[1] is not None  # no case is empty
    return planned[1]


def _row_stats(case: Case) -> common.Launch:
    chosen = configs.layer_norm(case.arch, case.torch_dtype, case.size)
    return _launch(row_stats.plan(_stream(case), config=chosen))


def _norm_panel(case: Case) -> common.Launch:
    x, dim = _stream(case), case.size
    activation = "gelu" if "gelu" in case.variant else None
    parameters = _parameters(case, dim, dim)
    panel = configs.norm_panel(case.arch, case.torch_dtype, dim, dim)
    assert panel is not None  # all_cases leaves these out
    return _launch(norm_linear.plan(x, _norm(x), *parameters, activation, config=panel))


def _linear_stats(case: Case) -> common.Launch:
    residual, dim = _stream(case), case.size
    x = _empty(case.batch, _TOKENS, dim, dtype=case.torch_dtype)
    if "unaligned" in case.variant:
        x = _empty(case.batch, _TOKENS, dim + 1, dtype=case.torch_dtype)[..., :dim]
    gamma = _empty(dim) if "gamma" in case.variant else None
    chosen = configs.linear(case.arch, case.torch_dtype, dim, dim)
    parameters = _parameters(case, dim, dim)
    stats = row_stats.empty(residual)
    planned = linear.plan(
        x, *parameters, None, residual, gamma, None, row_stats=stats, config=chosen
    )
    return _launch(planned)


def _norm_mlp(case: Case) -> common.Launch:
    x, dim = _stream(case), case.size
    products = (*_parameters(case, 4 * dim, dim), *_parameters(case, dim, 4 * dim))
    gamma = _empty(dim) if "gamma" in case.variant else None
    chosen = configs.gelu_mlp(case.arch, case.torch_dtype, dim)
    assert chosen is not None  # all_cases leaves these out
    stats = row_stats.empty(x)
    planned = gelu_mlp.plan(
        x, *products, x, gamma, None, norm=_norm(x), row_stats=stats, config=chosen
    )
    return _launch(planned)


BUILDERS: dict[str, Callable[[Case], common.Launch]] = {
    "row_stats": _row_stats,
    "norm_panel": _norm_panel,
    "linear_stats": _linear_stats,
    "norm_mlp": _norm_mlp,
}
