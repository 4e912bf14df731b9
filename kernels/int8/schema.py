"""Schemas and fakes of the operators in 8-bit integers.

On the CPU each is a function of Python's (cpu.py), which keeps its weights packed and calls the
kernel of the same name with `_packed`. csrc/cpu holds that kernel, and says how a weight is packed.
"""

from __future__ import annotations

from torch import Tensor

from deit.kernels.engine import eight_bits
from deit.kernels.engine.fakes import projected
from deit.kernels.engine.registry import CSRC, define
from deit.kernels.vit_block.arguments import block_schema


def fake_block(x: Tensor, *_: object) -> Tensor:
    """The fake of a block in 8-bit integers, however its weights lie."""
    return x.new_empty(x.shape)


def _packed_linear(x: Tensor, packed: Tensor, scales: Tensor, *_: object) -> Tensor:
    return projected(x, scales.shape[0])


def _packed_mlp(
    x: Tensor,
    packed1: Tensor,
    scales1: Tensor,
    sums1: Tensor,
    b1: object,
    packed2: Tensor,
    scales2: Tensor,
    *_: object,
) -> Tensor:
    return projected(x, scales2.shape[0])


def _weight(name: str) -> str:
    return f"Tensor {name}, Tensor {name}_scales, Tensor {name}_sums"


_BLOCK = block_schema("Tensor", row_stats=None, activation=None)
_PACKED_BLOCK = block_schema(
    "Tensor",
    row_stats=None,
    qkv_weight=_weight("qkv"),
    proj_weight=_weight("proj"),
    w1=_weight("w1"),
    w2=_weight("w2"),
    activation=None,
)

define("int8_linear", eight_bits.LINEAR, eight_bits.fake_linear, cpu="int8.cpu")
define("int8_gelu_mlp", eight_bits.MLP, eight_bits.fake_mlp, cpu="int8.cpu")
define("int8_vit_block", _BLOCK, fake_block, cpu="int8.cpu")
define(
    "int8_linear_packed",
    "(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias, "
    f"{eight_bits.NORM}, bool gelu, Tensor? residual, Tensor? gamma) -> Tensor",
    _packed_linear,
    cpu=CSRC,
)
define(
    "int8_gelu_mlp_packed",
    "(Tensor x, Tensor packed1, Tensor scales1, Tensor sums1, Tensor? b1, Tensor packed2, "
    f"Tensor scales2, Tensor sums2, Tensor? b2, {eight_bits.NORM}, Tensor? residual, "
    "Tensor? gamma) -> Tensor",
    _packed_mlp,
    cpu=CSRC,
)
define("int8_vit_block_packed", _PACKED_BLOCK, fake_block, cpu=CSRC)
