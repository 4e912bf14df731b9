"""Schemas and fakes of the CPU's products by a weight that lies in three tensors.

Beside those of ops.py, whose operators they are for models that hold q, k and v apart
(kernels/thirds.py): csrc/cpu reads the three where they lie. In inference alone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deit.kernels.engine.eight_bits_schemas import block
from deit.kernels.engine.fakes import FAKES as OTHERS

_WEIGHTS = "Tensor first, Tensor second, Tensor third"
_QKV = "Tensor q_weight, Tensor k_weight, Tensor v_weight"
_INT8_BLOCK = block("Tensor {0}_weight", "Tensor {0}", qkv=_QKV)

NATIVE: dict[str, str] = {
    "linear_thirds": f"(Tensor x, {_WEIGHTS}, Tensor? bias) -> Tensor",
    "vit_block_thirds": _INT8_BLOCK.replace("-> Tensor", "-> (Tensor, Tensor)"),
}
INT8: dict[str, str] = {
    "int8_linear_thirds": (
        f"(Tensor x, {_WEIGHTS}, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps)"
        " -> Tensor"
    ),
    "int8_vit_block_thirds": _INT8_BLOCK,
}
SCHEMAS = NATIVE | INT8


def _linear_fake(x: Tensor, first: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], 3 * first.shape[0]))


FAKES: dict[str, Callable[..., object]] = {
    "linear_thirds": _linear_fake,
    "vit_block_thirds": OTHERS["vit_block"],
    "int8_linear_thirds": _linear_fake,
    "int8_vit_block_thirds": lambda x, *_: x.new_empty(x.shape),
}
