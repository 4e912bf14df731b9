"""The arguments of a whole block, once: their order, their kinds and their schema."""

from __future__ import annotations

import typing
from typing import NamedTuple

from torch import Tensor


class BlockArguments(NamedTuple):
    """`vit_block`'s, as its schema has them; shapes and dtypes are the public function's.

    Those of the block in 8-bit integers are the same without row_stats and activation, and the
    arguments of a kernel that reads a weight in another form have several in the weight's place.
    An activation of None is the exact GELU: a call of the usual kind hands no string over.
    """

    x: Tensor
    row_stats: Tensor | None
    norm1_weight: Tensor
    norm1_bias: Tensor | None
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    gamma1: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    gamma2: Tensor | None
    key_bias: Tensor | None
    num_heads: int
    scale: float
    eps: float
    activation: str | None = None


_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float",
          str | None: "str?"}  # fmt: skip
_SPELLED = {
    name: f"{_KINDS[kind]} {name}" for name, kind in typing.get_type_hints(BlockArguments).items()
}
_SPELLED |= {
    name: f"{_SPELLED[name]}={default}" for name, default in BlockArguments._field_defaults.items()
}


def block_schema(returns: str, **replaced: str | None) -> str:
    """The schema of a block that takes these arguments, some of them spelled otherwise.

    replaced: by an argument's name, what stands in its place; None for nothing.
    """
    spelled = (_SPELLED | replaced).values()
    return f"({', '.join(each for each in spelled if each is not None)}) -> {returns}"
