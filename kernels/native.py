"""Loads the compiled libraries built from csrc/."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

LIBRARIES = {"cpu": "_cpu", "cuda": "_cuda"}


@functools.cache
def why_not(kind: str) -> tuple[str, ...]:
    """Load the library for `kind` ("cpu" or "cuda") once; () when its operators are usable."""
    spec = importlib.util.find_spec(f"deit.kernels.{LIBRARIES[kind]}")
    if spec is None or spec.origin is None:
        return (f"the {kind} library is not built",)
    try:
        torch.ops.load_library(Path(spec.origin))
    except OSError as error:
        return (f"the {kind} library does not load: {error}",)
    return ()
