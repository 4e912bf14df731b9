"""Arguments for every operator's schemas, of the forward and of training alike.

    schema_calls.arguments("linear_bwd", "triton")

Those of a forward are a public call's with every optional set (`CALLS`), or with none
(`full=False`). Those of a `_bwd` are found by name: the forward's own, what its `_fwd` returned,
a random `d<output>` for each output, and which gradients are wanted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch

import deit.kernels
from deit.kernels.engine import registry
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.prove import calls

_TINY = calls.Size(2, 5, 64, width=32, hidden=96, side=2, classes=10)


@functools.cache
def _every(operator: str, size: calls.Size = _TINY) -> tuple[list[Any], dict[str, Any]]:
    call = calls.build(operator, calls.Draw(), size, "every")
    return call.written(call.inputs)


# One valid call of every public operator, as a user writes it, every optional argument at a
# non-default value.
CALLS = {name: _every(name) for name in calls.operators()}


def forward(
    operator: str,
    *,
    size: calls.Size = _TINY,
    full: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Any]:
    """The arguments of a public operator's schema, floating-point tensors in `dtype`."""
    inputs, options = _every(operator, size)
    prepared = OPERATORS[operator].prepare(*inputs, **options)
    arguments = []
    for value, formal in zip(prepared, schema(operator).arguments, strict=True):
        if not full and isinstance(formal.type, torch.OptionalType):
            value = None
        if isinstance(value, torch.Tensor):
            value = value.to(device, dtype if value.is_floating_point() else None, copy=True)
        arguments.append(value)
    return arguments


def argument_names(operator: str) -> list[str]:
    """The public function's own, in its order; vit_block's schema has another."""
    names = inspect.signature(getattr(deit.kernels, operator)).parameters
    return [name for name in names if name != "impl"]


def schema(name: str) -> Any:
    """The schema as torch has parsed it."""
    return registry.COMPILED["triton"][name]._schema


def arguments(name: str, impl: str, **options: Any) -> list[Any]:
    """The arguments of any schema; `impl` runs the forward whose results a `_bwd` reads."""
    operator = name.removesuffix("_fwd").removesuffix("_bwd")
    inputs = forward(operator, **options)
    if not name.endswith("_bwd"):
        return inputs
    saving = f"{operator}_fwd" if f"{operator}_fwd" in registry.FAKES else operator
    known = dict(zip((a.name for a in schema(operator).arguments), inputs, strict=True))
    outputs = each(registry.COMPILED[impl][saving](*inputs))
    for formal, value in zip(schema(saving).returns, outputs, strict=True):
        known[formal.name or "out"] = value
        known[f"d{formal.name or 'out'}"] = torch.randn_like(value)
    # Every gradient, and in a call without optionals every other one.
    full = options.get("full", True)
    known["wanted"] = [full or i % 2 == 0 for i in range(len(schema(name).returns))]
    if isinstance(known.get("prefix"), torch.Tensor):
        known["prefix_tokens"] = known["prefix"].shape[1]
    return [known[formal.name] for formal in schema(name).arguments]


def each(value: Any) -> Sequence[torch.Tensor]:
    """One output or several."""
    return value if isinstance(value, (tuple, list)) else (value,)
