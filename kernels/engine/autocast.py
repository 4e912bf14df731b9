"""What autocast asks of an operator that is a matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine.limits import KERNEL_DTYPES


def dtype_of(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of matrix products on x's device; None where it is off."""
    if not torch._C._is_any_autocast_enabled():  # before the device's name, which takes 0.3 us
        return None
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has no autocast
        return torch.get_autocast_dtype(device_type)
    return None


def cast(x: Tensor, *others: Tensor | None) -> Any:
    """The tensors as a matrix product under autocast would see them, in the same order."""
    tensors = (x, *others)
    dtype = dtype_of(x)
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in KERNEL_DTYPES else t for t in tensors
    )
