"""The launches of the operators in e4m3, for `cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deit.kernels import fp8
from deit.kernels.device import common, configs
from deit.kernels.fp8 import tiles as fp8_configs
from deit.kernels.fp8 import triton_product as fp8_product
from deit.kernels.fp8 import triton_rows as fp8_rows
from deit.kernels.fp8.quantize import E4M3, GROUP

if TYPE_CHECKING:
    from deit.kernels.prove.cases import Case

_TOKENS = 197

VARIANTS: dict[str, tuple[str, ...]] = {
    "fp8_rows": ("plain", "norm"),
    "fp8_product": ("bias", "gelu", "hidden", "residual gamma", "unaligned residual gamma"),
}
# Compiled for a tile and not for a width.
TILED = ("fp8_product",)


def config(operator: str, arch: int, dtype: torch.dtype, size: int) -> object:
    """What, beside the size, the kernels of an operator are compiled for; None for no kernel."""
    if arch < 10 * fp8.CAPABILITY[0] + fp8.CAPABILITY[1]:
        return None
    if operator == "fp8_rows":
        return configs.layer_norm(arch, dtype, size)
    # The result's dtype, and the hidden layer's.
    return tuple(fp8_configs.fp8_product(arch, kind, size, size) for kind in (dtype, E4M3))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows(case: Case) -> common.Launch:
    dtype, dim = case.torch_dtype, case.size
    weight, bias = (_empty(dim, dtype=dtype) for _ in range(2))
    norm = fp8_rows.Norm(weight, bias, 1e-6) if case.variant == "norm" else None
    chosen = configs.layer_norm(case.arch, dtype, dim)
    _, launch = fp8_rows.plan(_empty(case.batch, _TOKENS, dim, dtype=dtype), norm, config=chosen)
    assert launch is not None  # no case is empty
    return launch


def _product(case: Case) -> common.Launch:
    dtype, dim = case.torch_dtype, case.size
    width = dim + 1 if "unaligned" in case.variant else dim  # which a descriptor cannot take
    x = fp8_rows.empty(case.batch * _TOKENS, dim, torch.device("meta"))
    padded = -(-dim // GROUP) * GROUP
    weight = fp8_product.Weight(_empty(width, padded, dtype=E4M3), _empty(width))
    bias, hidden = _empty(width, dtype=dtype), case.variant == "hidden"
    chosen = fp8_configs.fp8_product(case.arch, E4M3 if hidden else dtype, width, padded)
    if hidden:
        _, launch = fp8_product.plan_hidden(x, weight, bias, config=chosen)
    else:
        out = _empty(case.batch, _TOKENS, width, dtype=dtype)
        full = "residual" in case.variant
        residual, gamma = (out, _empty(width, dtype=dtype)) if full else (None, None)
        activation = "gelu" if case.variant == "gelu" else None
        launch = fp8_product.plan(x, weight, bias, activation, residual, gamma, out, config=chosen)
    assert launch is not None
    return launch


BUILDERS: dict[str, Callable[[Case], common.Launch]] = {
    "fp8_rows": _rows,
    "fp8_product": _product,
}
