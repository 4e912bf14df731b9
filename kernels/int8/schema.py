"""Schemas and fakes of the products in 8 bits, beside those of ops.py and fakes.py.

They stand apart because what holds for every operator there, gradients and the error rule
against fp64, cannot hold for a product that rounds its factors to 8 bits.

`norm_weight`, `norm_bias` and `eps` are a LayerNorm's that comes before the product; weights are
the floating-point ones. The `_packed` schemas are what csrc/cpu serves, weights in its layout.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_EPILOGUE = "Tensor? norm_weight, Tensor? norm_bias, float eps"


def block(projection: str, layer: str, qkv: str | None = None) -> str:
    """The schema of a whole block whose weights are spelled so by name."""
    return (
        f"(Tensor x, Tensor norm1_weight, Tensor? norm1_bias, {qkv or projection.format('qkv')}, "
        f"Tensor? qkv_bias, {projection.format('proj')}, Tensor? proj_bias, Tensor? gamma1, "
        f"Tensor norm2_weight, Tensor? norm2_bias, {layer.format('w1')}, Tensor? b1, "
        f"{layer.format('w2')}, Tensor? b2, Tensor? gamma2, Tensor? key_bias, int num_heads, "
        "float scale, float eps) -> Tensor"
    )


_LINEAR = (
    f"(Tensor x, Tensor weight, Tensor? bias, {_EPILOGUE}, bool gelu, Tensor? residual, "
    "Tensor? gamma) -> Tensor"
)
_MLP = (
    f"(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, {_EPILOGUE}, "
    "Tensor? residual, Tensor? gamma) -> Tensor"
)

INT8: dict[str, str] = {
    "int8_linear": _LINEAR,
    "int8_gelu_mlp": _MLP,
    "int8_vit_block": block("Tensor {0}_weight", "Tensor {0}"),
}
FP8: dict[str, str] = {"fp8_linear": _LINEAR, "fp8_gelu_mlp": _MLP}
SCHEMAS = INT8 | FP8  # the public operators

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
    "int8_vit_block_packed": block(*2 * ("Tensor {0}, Tensor {0}_scales, Tensor {0}_sums",)),
}

ALL = SCHEMAS | PACKED_SCHEMAS


def _projected(x: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


def _linear_fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return _projected(x, weight.shape[0])


def _mlp_fake(x: Tensor, w1: Tensor, b1: object, w2: Tensor, *_: object) -> Tensor:
    return _projected(x, w2.shape[0])


FAKES: dict[str, Callable[..., object]] = {
    "fp8_linear": _linear_fake,
    "fp8_gelu_mlp": _mlp_fake,
    "int8_linear": _linear_fake,
    "int8_gelu_mlp": _mlp_fake,
    "int8_vit_block": lambda x, *_: x.new_empty(x.shape),
    "int8_vit_block_packed": lambda x, *_: x.new_empty(x.shape),
    "int8_linear_packed": lambda x, packed, scales, *_: _projected(x, scales.shape[0]),
    "int8_gelu_mlp_packed": lambda x, packed1, scales1, sums1, b1, packed2, scales2, *_: _projected(
        x, scales2.shape[0]
    ),
}
