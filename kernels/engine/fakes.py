"""What the operators' fakes share: empty tensors of the shapes and dtypes of their outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def projected(x: Tensor, width: int, residual: Tensor | None = None) -> Tensor:
    """A linear layer's output [..., width], in residual's dtype where there is one."""
    dtype = x.dtype if residual is None else residual.dtype
    return x.new_empty((*x.shape[:-1], width), dtype=dtype)


def through(dout: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a linear layer's input, in its weight's dtype."""
    return weight.new_empty((*dout.shape[:-1], weight.shape[1]))


def like(given: Tensor | None, other: Tensor) -> Tensor:
    """The gradient of `given`, or the empty tensor that stands for none, made from `other`."""
    return other.new_empty(0) if given is None else given.new_empty(given.shape)


def of_wanted(wanted: Sequence[bool] | None, *gradients: Tensor) -> tuple[Tensor, ...]:
    """The gradients that are wanted, and empty tensors in place of the others."""
    if wanted is None:
        return gradients
    return tuple(g if w else g.new_empty(0) for g, w in zip(gradients, wanted, strict=True))
