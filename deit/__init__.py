"""fused-deit: DeiT vision transformers, run and trained on fused kernels.

Importing this package loads torch and nothing heavier: no triton, no timm, no compiled library.
"""

from __future__ import annotations

from deit.configs import PUBLISHED, VARIANTS, Config, config
from deit.model import DeiT

__version__ = "0.1.0"

__all__ = ["PUBLISHED", "VARIANTS", "Config", "DeiT", "config", "create"]


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
    settings = config(arch, distilled=distilled, img_size=img_size, num_classes=num_classes)
    return DeiT(settings, drop_path=drop_path, test_head=test_head)
