"""Schemas and fakes of the CPU's products by a weight that lies in three tensors.

They stand beside the operators' own schemas, for models that hold q, k and v apart: csrc/cpu reads
the three where they lie. They are for inference alone.
"""

from __future__ import annotations

from torch import Tensor

from deit.kernels.engine.eight_bits import NORM
from deit.kernels.engine.fakes import projected
from deit.kernels.engine.registry import CSRC, define
from deit.kernels.int8 import schema as int8
from deit.kernels.vit_block import schema as vit_block
from deit.kernels.vit_block.arguments import block_schema

_WEIGHTS = "Tensor first, Tensor second, Tensor third"
_QKV = "Tensor q_weight, Tensor k_weight, Tensor v_weight"
_CPU = ("cpu",)


def _linear(x: Tensor, first: Tensor, *_: object) -> Tensor:
    return projected(x, 3 * first.shape[0])


define(
    "linear_thirds",
    f"(Tensor x, {_WEIGHTS}, Tensor? bias) -> Tensor",
    _linear,
    implementations=_CPU,
    cpu=CSRC,
)
define(
    "vit_block_thirds",
    block_schema("(Tensor, Tensor)", row_stats=None, qkv_weight=_QKV),
    vit_block.fake,
    implementations=_CPU,
    cpu=CSRC,
)
# With rotary positions the weight may lie in one tensor, too.
define(
    "vit_block_rotary",
    block_schema(
        "(Tensor, Tensor)",
        row_stats=None,
        qkv_weight="Tensor q_weight, Tensor? k_weight, Tensor? v_weight",
        key_bias="Tensor sin, Tensor cos, int prefix, bool interleaved",
    ),
    vit_block.fake,
    implementations=_CPU,
    cpu=CSRC,
)
define(
    "int8_linear_thirds",
    f"(Tensor x, {_WEIGHTS}, Tensor? bias, {NORM}) -> Tensor",
    _linear,
    implementations=_CPU,
    cpu="int8.cpu",
)
define(
    "int8_vit_block_thirds",
    block_schema("Tensor", row_stats=None, qkv_weight=_QKV, activation=None),
    int8.fake_block,
    implementations=_CPU,
    cpu="int8.cpu",
)
