"""Which derivatives a call owes, and which gradients a backward owes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_gradient(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd will want this call's gradients."""
    if torch.is_grad_enabled():
        for argument in arguments:  # a generator's set-up alone would double this
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def has_tangent(arguments: tuple[Any, ...]) -> bool:
    """Whether a forward-mode derivative (torch.autograd.forward_ad) is taken through this call."""
    if forward_ad._current_level < 0:
        return False
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def gradients(ctx: Any, backward: Callable[..., Any], places: Sequence[int]) -> list[Any]:
    """One gradient an input of an autograd.Function: those that autograd wants, None for others.

    backward: called with `wanted`, one bool for each of `places`, the inputs by position that it
        returns gradients of; not called where it would compute none of them.
    """
    found: list[Any] = [None] * len(ctx.needs_input_grad)
    wanted = [ctx.needs_input_grad[place] for place in places]
    if any(wanted):
        for place, gradient, is_wanted in zip(places, backward(wanted), wanted, strict=True):
            found[place] = gradient if is_wanted else None
    return found
