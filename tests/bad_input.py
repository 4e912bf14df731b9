"""One call of every operator with one argument spoilt: a clear error or a correct result.

    outcome(name, impl, argument, CHANGES["half"])

An argument is spoilt in its memory (strided, overlapping), its shape, its dtype, its device or its
kind. What comes must be an error that names an argument and is a TypeError or ValueError, a
refusal of the named implementation with a reason, or the values that the reference computes in
fp64 from the same numbers; anything else is an AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from schema_calls import CALLS, argument_names, each
from torch import Tensor

import deit.kernels
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.prove import reference

# These keep the shape and the dtype. They change the values where the memory overlaps.
LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "last axis strided": lambda t: torch.stack([t, t], dim=-1).flatten(-2)[..., ::2],
    "last axis expanded": lambda t: t[..., :1].expand(t.shape),
    "first axis expanded": lambda t: t[:1].expand(t.shape),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
    "axes swapped": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t[0],
    "longer": lambda t: torch.cat([t, t[..., :1]], dim=-1),
    "shorter": lambda t: t[..., 1:],
    "no rank": lambda t: t.flatten()[0],
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "double": lambda t: t.double(),
    "int32": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t > 0,
    "meta": lambda t: t.to("meta"),
    "a list": lambda t: t.tolist(),
    "a string": lambda t: "tensor",
}
CHANGES = LAYOUTS | WRONG
# These are never right: no operator takes an argument so.
# But logits may have any number of classes that holds the targets' indices.
ALWAYS_WRONG = ("longer", "shorter", "int32", "complex", "a list", "a string", "no rank")


def tensors(name: str) -> list[str]:
    """The arguments of the operator's call that are tensors."""
    return [key for key, value in given(name).items() if isinstance(value, Tensor)]


def held(name: str) -> set[str]:
    """The arguments for which kernels have no gradient."""
    return set(OPERATORS[name].constants.values())


def given(name: str) -> dict[str, Any]:
    """The call of schema_calls.CALLS with every argument by name."""
    inputs, options = CALLS[name]
    call = dict(zip(argument_names(name), inputs, strict=False)) | options
    call.pop("row_stats", None)  # they belong to the x that is not spoilt
    return call


def outcome(name: str, impl: str, argument: str, change: Callable[[Tensor], Any]) -> str:
    """ "error", "refused" or "right"; see above."""
    call = given(name)
    call[argument] = change(call[argument])
    return judge(name, impl, call)


def judge(name: str, impl: str, call: dict[str, Any]) -> str:
    """The same of a whole call."""
    try:
        found = each(getattr(deit.kernels, name)(**call, impl=impl))
    except (NotImplementedError, TypeError, ValueError) as error:
        caught = error
    else:
        _check_values(name, call, found)
        return "right"
    if isinstance(caught, NotImplementedError):
        assert str(caught).startswith(f"{name}: impl={impl!r} cannot run here: ")
        return "refused"
    subject = str(caught).partition(":")[0]
    assert subject in argument_names(name), f"{type(caught).__name__} names none: {caught}"
    return "error"


def _check_values(name: str, call: dict[str, Any], found: Sequence[Tensor]) -> None:
    exact = each(getattr(reference, name)(*prepared_in_fp64(name, call)))
    for ours, best in zip(found, exact, strict=True):
        assert ours.shape == best.shape
        near = 0.05 if ours.dtype in (torch.float16, torch.bfloat16) else 2e-3
        assert (ours.double() - best).norm() <= near * best.norm(), name


def prepared_in_fp64(name: str, call: dict[str, Any]) -> list[Any]:
    """What the reference takes, of the same numbers, packed and in fp64."""

    def packed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone(memory_format=torch.contiguous_format)
        return value.double() if value.is_floating_point() else value

    return list(OPERATORS[name].prepare(**{k: packed(v) for k, v in call.items()}))
