"""Answers that torch.compile takes as constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cached, and evaluated once by torch.compile instead of traced into.

    What `torch.compiler.assume_constant_result` does, without its import of torch._dynamo
    (which imports triton, and takes a second).
    """
    cached = functools.cache(function)

    def constant(*arguments: Any) -> Any:
        return cached(*arguments)

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return functools.update_wrapper(constant, function)
