"""Devices and dtypes by the names that users give them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def named(device: str) -> torch.device:
    """A torch device; "auto" is the first GPU, or the CPU where there is none.

    Raises ValueError for one that is not here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        # torch raises AssertionError where it was built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {device!r} ({reason})") from None
    return place


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Matrix products in `dtype`, one of DTYPES, within; "fp32" leaves them as they are."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32")
