"""One call of an operator as data: what is measured, and what a measurement speaks for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine.derivatives import needs_gradient
from deit.kernels.engine.json_files import Fields, shown
from deit.kernels.engine.operator import OPERATORS, Arguments, Operator

MOST_AXES = 8
LARGEST = 2**40  # of a shape's numbers
_VALUES = (bool, int, float, str)

Sizes = tuple[Any, ...]  # of numbers, texts, None and dtypes


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its numbers; gradient: whether one is wanted of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool = False

    def numel(self) -> int:
        """As a tensor's."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Problem:
    """One call of an operator, by the schema's arguments.

    arguments: TensorSpecs in the place of tensors, the others as they are.
    """

    operator: str
    training: bool
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, operator: Operator, arguments: Arguments) -> Problem:
        """That of a call; its tensors may be on any device, meta too."""
        training = needs_gradient(arguments)
        specs = tuple(
            TensorSpec(tuple(map(int, a.shape)), a.dtype, training and a.requires_grad)
            if isinstance(a, Tensor)
            else a
            for a in arguments
        )
        return cls(operator.name, training, specs)

    def made(self, tensor: Callable[[TensorSpec], Tensor]) -> Arguments:
        """The arguments, each tensor as `tensor` makes it."""
        return tuple(tensor(a) if isinstance(a, TensorSpec) else a for a in self.arguments)

    @functools.cached_property
    def shape_class(self) -> ShapeClass:
        """What a measurement of it speaks for."""
        return shape_class(OPERATORS[self.operator], self.arguments, self.training)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        arguments = [
            {"shape": list(a.shape), "dtype": dtype_name(a.dtype), "gradient": a.gradient}
            if isinstance(a, TensorSpec)
            else a
            for a in self.arguments
        ]
        return {"operator": self.operator, "training": self.training, "arguments": arguments}

    @classmethod
    def revive(cls, found: Fields) -> Problem:
        """From JSON; ValueError for what is none. Its operator may be another package's, which this
        process has not imported."""
        found.only(("operator", "training", "arguments"))
        operator = found.text("operator")[:100]
        kinds = (dict, type(None), *_VALUES)
        given = found.array("arguments", kinds, "tensors and plain values")
        arguments = tuple(
            _revive_tensor(Fields(a, found.file, f"{found.path}.arguments[{number}]"))
            if isinstance(a, dict)
            else a
            for number, a in enumerate(given)
        )
        if not arguments or not isinstance(arguments[0], TensorSpec):
            raise found.wrong("arguments", "a tensor first", given)
        return cls(operator, found.flag("training"), arguments)

    def __str__(self) -> str:
        first = self.arguments[0]
        mode = "training" if self.training else "inference"
        shape = " x ".join(map(str, first.shape))
        return f"{self.operator}, {mode}, {shape}, {dtype_name(first.dtype)}"


def _revive_tensor(found: Fields) -> TensorSpec:
    found.only(("shape", "dtype", "gradient"))
    shape = tuple(found.array("shape", int, "whole numbers"))
    if len(shape) > MOST_AXES or not all(0 <= n <= LARGEST for n in shape):
        raise found.wrong("shape", f"at most {MOST_AXES} numbers from 0 to 2^40", shape)
    return TensorSpec(shape, dtype_of(found.text("dtype")), found.flag("gradient"))


@dataclass(frozen=True)
class ShapeClass:
    """The calls that a measurement speaks for.

    dtype: of the first argument. sizes: what `Operator.sizes` says. rows, tokens: buckets, the
    whole part of log2 of the rows of the first argument, and of its tokens where the operator's
    time depends on them. Of the buckets the nearest measured one is taken; all else must match.
    """

    operator: str
    training: bool
    dtype: torch.dtype
    sizes: Sizes
    rows: int
    tokens: int | None = None

    @property
    def family(self) -> tuple[Any, ...]:
        """Everything but the buckets."""
        return self.operator, self.training, self.dtype, self.sizes

    def distance(self, rows: int, tokens: int | None) -> float:
        """How far its buckets are from these, in powers of two; tokens count like rows."""
        return abs(self.rows - rows) + abs((self.tokens or 0) - (tokens or 0))

    def __str__(self) -> str:
        mode = "training" if self.training else "inference"
        sizes = ", ".join(
            dtype_name(s) if isinstance(s, torch.dtype) else str(s) for s in self.sizes
        )
        tokens = "" if self.tokens is None else f", {2**self.tokens} tokens"
        return (
            f"{self.operator}({sizes}), {dtype_name(self.dtype)}, {mode}, {2**self.rows} rows"
            + tokens
        )


def shape_class(operator: Operator, arguments: Arguments, training: bool) -> ShapeClass:
    """That of a call."""
    x = arguments[0]
    sizes = operator.sizes(*arguments)
    return ShapeClass(operator.name, training, x.dtype, sizes, *buckets(operator, x))


def buckets(operator: Operator, x: Tensor | TensorSpec) -> tuple[int, int | None]:
    """Of rows, and of tokens where the operator's time depends on them: the whole part of log2."""
    shape = x.shape
    rows = bucket(x.numel() // (shape[-1] or 1))
    return rows, bucket(shape[1]) if operator.by_tokens else None


def bucket(count: int) -> int:
    """The whole part of log2; 0 for none."""
    return (count or 1).bit_length() - 1


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Raises ValueError for what is no dtype's name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: expected a torch dtype's name; got {shown(name)}")
    return found
