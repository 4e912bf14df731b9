"""fused-deit: DeiT vision transformers, run and trained on fused kernels.

Importing this package loads next to nothing: torch with the first network or weights asked for,
and triton, timm and the compiled library only where one of them is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deit.configs import PUBLISHED, VARIANTS, Config, config

if TYPE_CHECKING:
    from deit.model import DeiT
    from deit.weights.checkpoint import load

__version__ = "0.1.0"

__all__ = ["PUBLISHED", "VARIANTS", "Config", "DeiT", "config", "create", "load"]

# Imported when asked for: these need torch, which `deit --help` should not wait for.
_LAZY = {"DeiT": "deit.model", "load": "deit.weights.checkpoint"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def create(
    arch: str,
    *,
    distilled: bool | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
    drop_path: float = 0.0,
    test_head: str = "softmax-sum",
) -> DeiT:
    """A freshly initialised plain DeiT; names and arguments as in `deit.config` and `DeiT`."""
    from deit.model import DeiT

    settings = config(arch, distilled=distilled, img_size=img_size, num_classes=num_classes)
    return DeiT(settings, drop_path=drop_path, test_head=test_head)
