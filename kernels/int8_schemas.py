"""Schemas and fakes of the products in 8-bit integers, beside those of ops.py and fakes.py.

They stand apart because what holds for every operator there, gradients and the error rule
against fp64, cannot hold for a product that rounds its factors to 8 bits.

`norm_weight`, `norm_bias` and `eps` are a LayerNorm's that comes before the product; weights are
the floating-point ones. The `_packed` schemas are what csrc/cpu serves, weights in its layout.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_EPILOGUE = "Tensor? norm_weight, Tensor? norm_bias, float eps"

SCHEMAS: dict[str, str] = {
    "int8_linear": (
        f"(Tensor x, Tensor weight, Tensor? bias, {_EPILOGUE}, bool gelu, Tensor? residual, "
        "Tensor? gamma) -> Tensor"
    ),
    "int8_gelu_mlp": (
        f"(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, {_EPILOGUE}, "
        "Tensor? residual, Tensor? gamma) -> Tensor"
    ),
}

PACKED_SCHEMAS: dict[str, str] = {
    "int8_linear_packed": (
        f"(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias, {_EPILOGUE}, "
        "bool gelu, Tensor? residual, Tensor? gamma) -> Tensor"
    ),
    "int8_gelu_mlp_packed": (
        "(Tensor x, Tensor packed1, Tensor scales1, Tensor sums1, Tensor? b1, Tensor packed2, "
        f"Tensor scales2, Tensor sums2, Tensor? b2, {_EPILOGUE}, Tensor? residual, "
        "Tensor? gamma) -> Tensor"
    ),
}

ALL = SCHEMAS | PACKED_SCHEMAS


def _projected(x: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


FAKES: dict[str, Callable[..., object]] = {
    "int8_linear": lambda x, weight, *_: _projected(x, weight.shape[0]),
    "int8_gelu_mlp": lambda x, w1, b1, w2, *_: _projected(x, w2.shape[0]),
    "int8_linear_packed": lambda x, packed, scales, *_: _projected(x, scales.shape[0]),
    "int8_gelu_mlp_packed": lambda x, packed1, scales1, sums1, b1, packed2, scales2, *_: _projected(
        x, scales2.shape[0]
    ),
}
