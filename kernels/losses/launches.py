"""Launches of the losses that ship."""

from __future__ import annotations

import functools

import torch

from deit.kernels.device import common
from deit.kernels.losses import tiles as losses_tiles
from deit.kernels.losses import triton as losses
from deit.kernels.losses import triton_bwd as losses_bwd
from deit.kernels.prove.launches import Kernel, Shipped, empty, first

CLASSES = (1000, 21841)  # ImageNet, and ImageNet-21k: one block and a loop


def _loss(shipped: Shipped) -> common.Launch:
    logits = empty(shipped.batch, shipped.size, dtype=shipped.torch_dtype)
    soft = "soft" in shipped.variant
    target = logits if soft else torch.empty(shipped.batch, dtype=torch.int64, device="meta")
    smoothing = 0.1 if "smoothed" in shipped.variant else 0.0
    teaching = None
    if shipped.operator.startswith("distillation"):
        student = logits if "student" in shipped.variant else None
        kind = "hard" if "hard" in shipped.variant else "soft"
        teaching = losses.Teaching(logits, student, kind, 0.5, 3.0, "batchmean")
    if shipped.operator.endswith("_bwd"):
        dloss, statistics = empty(), empty(losses.STATISTICS, shipped.batch)
        return first(losses_bwd.plan(dloss, logits, target, statistics, smoothing, teaching))
    return losses.plan(logits, target, smoothing, teaching, save=True)[1][0]


_KERNEL = functools.partial(
    Kernel,
    config=lambda arch, dtype, size: losses_tiles.loss(size),
    build=_loss,
    sizes=CLASSES,
    products=False,
)
KERNELS = {
    "cross_entropy": _KERNEL(("index", "soft smoothed")),
    "cross_entropy_bwd": _KERNEL(("index", "soft smoothed")),
    "distillation_loss": _KERNEL(
        ("index hard", "soft smoothed student hard", "soft smoothed student kl")
    ),
    "distillation_loss_bwd": _KERNEL(("index hard", "soft smoothed student kl")),
}
