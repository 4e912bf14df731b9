"""The launch that ships and that no operator has to itself: the sum of partial sums."""

from __future__ import annotations

import torch

from deit.kernels.device import common, partials
from deit.kernels.prove.launches import Kernel, Shipped, empty


def _partial_sums(shipped: Shipped) -> common.Launch:
    # 264 is two programs on each of 132 multiprocessors. One program a row of tiles leaves more.
    slots, count = (1, 1) if shipped.variant == "one" else (3, 200 + shipped.batch // 4)
    outs = [empty(shipped.size, dtype=torch.bfloat16) for _ in range(slots)]
    return partials.plan_sum(empty(slots, count, shipped.size), *outs)


def _config(arch: int, dtype: torch.dtype, size: int) -> object:
    return "fp32" if dtype == torch.float32 else None  # whatever the operator's dtype


KERNELS = {"partial_sums": Kernel(("264 of 3", "one"), _config, _partial_sums, products=False)}
