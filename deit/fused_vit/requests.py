"""What `fuse` is asked for, checked, and whether anything may be measured at this moment."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from deit.fused_vit import calls, eight_bits
from deit.kernels.engine import dispatch

LAST_BLOCK = ("auto", "full")
BLOCK = ("auto", "parts", "whole")
MEASURE = ("auto", "now", "never")
VARIABLE = "FUSED_DEIT_MEASURE"
BUDGETS = {"cuda": 30.0, "cpu": 20.0}  # seconds

_forked = False


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_in_child)


@dataclass(frozen=True)
class Request:
    """What `fuse` was asked to measure, checked.

    budget: None for the device's. race: whether the whole model is raced, too.
    """

    how: str
    example: Tensor | None = None
    budget: float | None = None
    race: bool = True

    def of(self, example: Tensor) -> Request:
        """The same for the operators that are called for these images, and for them alone."""
        return replace(self, example=example, race=False)

    def seconds(self, device: torch.device) -> float:
        """The budget on a device."""
        return BUDGETS.get(device.type, 20.0) if self.budget is None else self.budget


def checked(
    model: nn.Module,
    impl: str,
    last_block: str,
    block: str,
    dtype: str | None,
    measure: str,
    example: Tensor | None,
    budget: float | None,
) -> Request:
    """What is to be measured; raises what `fuse` states."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if last_block not in LAST_BLOCK:
        raise ValueError(f"last_block: expected one of {LAST_BLOCK}; got {last_block!r}")
    if block not in BLOCK:
        raise ValueError(f"block: expected one of {BLOCK}; got {block!r}")
    if impl != "auto" and impl not in dispatch.IMPLEMENTATIONS:
        known = ", ".join(dispatch.IMPLEMENTATIONS)
        raise ValueError(f"impl: expected 'auto' or one of {known}; got {impl!r}")
    if dtype is not None and dtype not in eight_bits.KINDS:
        known = ", ".join(eight_bits.KINDS)
        raise ValueError(f"dtype: expected None or one of {known}; got {dtype!r}")
    if dtype is not None:
        eight_bits.KINDS[dtype].refuse(model, impl)
    return request(model, measure, example, budget)


def request(model: nn.Module, measure: str, example: Any, budget: Any) -> Request:
    """`fuse`'s arguments, checked; FUSED_DEIT_MEASURE stands in the place of "auto".

    Raises:
        ValueError: an unknown `measure`; a `budget` that is not positive and finite; an `example`
            on another device than the model, or that the model does not take. TypeError: of
            another type.
    """
    if measure not in MEASURE:
        raise ValueError(f"measure: expected one of {MEASURE}; got {measure!r}")
    if measure == "auto":
        measure = os.environ.get(VARIABLE) or measure
        if measure not in MEASURE:
            raise ValueError(f"{VARIABLE}: expected one of {MEASURE}; got {measure!r}")
    if budget is not None:
        check_budget(budget)
    if example is not None:
        check_example(model, example)
    return Request(measure, example, budget)


def check_budget(budget: Any) -> None:
    """Raises TypeError or ValueError for what is no positive number of seconds."""
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"budget: expected seconds; got {type(budget).__name__}")
    if not 0 < float(budget) < math.inf:
        raise ValueError(f"budget: expected a positive number of seconds; got {budget}")


def check_example(model: nn.Module, example: Any, name: str = "example") -> None:
    """Raises TypeError for what is no tensor, ValueError for one that the model does not take."""
    if not isinstance(example, Tensor):
        raise TypeError(f"{name}: expected a tensor of images; got {type(example).__name__}")
    device = device_of(model)
    if isinstance(device, torch.device) and example.device != device:
        raise ValueError(
            f"{name}: expected on {device}, as the model's parameters; got {example.device}"
        )
    if example.dim() == 0 or example.numel() == 0:
        raise ValueError(f"{name}: expected at least one image; got shape {list(example.shape)}")
    shape = calls.image_shape(model)
    if shape is not None and (example.dim() != 4 or example.shape[1] != shape[0]):
        wanted = f"[B, {shape[0]}, {shape[1]}, {shape[2]}]"
        raise ValueError(f"{name}: expected images {wanted}; got {list(example.shape)}")
    if device == example.device and device.type in BUDGETS:
        try:
            calls.run_without_weights(model, example.shape, example.dtype, training=False)
        except calls.Unknown as error:
            if isinstance(error.__cause__, _LIMITS):
                return  # of running without weights, and not of the example
            raise ValueError(
                f"{name}: the model does not take {example.dtype} {list(example.shape)}: {error}"
            ) from error


# What fake tensors cannot do, whatever the input.
_LIMITS = (
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.UnsupportedOperatorException,
    type(None),  # there was no run
)


def device_of(model: nn.Module) -> torch.device | str:
    """Where a model's parameters are, or why that is no one place."""
    found = {p.device for p in model.parameters()}
    if not found:
        return "it has no parameters"
    if len(found) > 1:
        return "its parameters are on " + " and ".join(sorted(map(str, found)))
    return found.pop()


def obstacle() -> str:
    """Why nothing may be measured at this moment; "" where it may."""
    if _forked:
        return "within a forked child"
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "within torch.compile, export or a trace"
    if torch._C._are_functorch_transforms_active():
        return "within a torch.func transform"
    if torch._C._current_graph_task_id() != -1:
        return "within a backward"
    if torch._C._len_torch_dispatch_stack():
        return "within a dispatch mode, such as fake tensors'"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "within a CUDA graph's capture"
    return ""
