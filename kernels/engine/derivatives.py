"""Which derivatives a call owes, and which gradients a backward owes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, function


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


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's `backward`, of first order alone, as PyTorch's decorator of the name has it.

    That decorator's questions cost 8 us a call and are asked where somebody may take second ones.
    It is for a Function with `set_materialize_grads(False)`. Otherwise autograd fills zeros for
    every output without a gradient, saved ones too: those as large as an MLP's hidden layer took 4
    to 7 % of its forward and backward. None has one where an operator behind it returned none.
    """
    careful = function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *douts: Tensor | None) -> Any:
        if douts[0] is None and all(dout is None for dout in douts):
            return (None,) * len(ctx.needs_input_grad)
        return (careful if torch.is_grad_enabled() else backward)(ctx, *douts)

    return run


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
