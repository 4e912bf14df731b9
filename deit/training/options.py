"""What one training run is told, besides its recipe. No torch here: the command line reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from deit.configs import Config, config
from deit.recipes import DEIT, Recipe

WORKERS = min(4, os.cpu_count() or 1)  # more than there are cores, and PyTorch warns


@dataclass(frozen=True)
class Shape:
    """Changes to a variant's shape, for images or budgets that no published variant fits."""

    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None

    def changes(self) -> dict[str, int]:
        """The fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


def resolve(arch: str, *, img_size: int, num_classes: int, distilled: bool, shape: Shape) -> Config:
    """The Config of one of our variants, with its shape changed as asked.

    Raises ValueError for an unknown name or an impossible shape.
    """
    settings = config(arch, distilled=distilled or None, num_classes=num_classes)
    changes: dict[str, Any] = {**shape.changes()}
    if "embed_dim" in changes and "num_heads" not in changes:
        # Head dimension 64, which is what the kernels are made for.
        changes["num_heads"] = max(1, changes["embed_dim"] // 64)
    return replace(settings, img_size=img_size, **changes)


@dataclass(frozen=True)
class Distillation:
    """How a student learns from its teacher, with the paper's values as defaults (section 4).

    With a distillation token the class head learns the labels and the distillation head the
    teacher; without one, the class head learns both.
    """

    kind: Literal["none", "soft", "hard"] = "none"
    alpha: float | None = None  # the teacher's share; None: 0.5 for hard, 0.1 for soft
    temperature: float = 3.0  # tau, for soft
    kl_reduction: Literal["batchmean", "numel"] = "batchmean"  # numel: the official code's


@dataclass(frozen=True)
class Options:
    """One run: the recipe says how, this says what, where and with which means.

    Raises ValueError for options that contradict each other.
    """

    data: str
    out: Path
    arch: str = "deit_s"
    recipe: Recipe = DEIT
    distillation: Distillation = Distillation()
    teacher: str | None = None
    distilled: bool = False
    img_size: int = 224
    shape: Shape = field(default_factory=Shape)
    weights: str | None = None
    train_only: Literal["all", "classifier"] = "all"
    seed: int = 0
    device: str = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = WORKERS
    augment_on: Literal["workers", "device"] = "workers"
    accumulate: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    checkpoint_activations: bool = False
    fuse: bool = True
    limit_train: int | None = None
    limit_val: int | None = None
    eval_every: int = 1  # epochs
    save_every: int = 1  # epochs
    keep: int = 2
    track: tuple[str, ...] = ()
    on_nan: Literal["stop", "skip"] = "stop"
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        for name in ("accumulate", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        if not 0.0 <= self.max_unreadable <= 1.0:
            raise ValueError(f"max_unreadable: expected in [0, 1]; got {self.max_unreadable}")
        if (self.teacher is None) != (self.distillation.kind == "none"):
            raise ValueError(
                "teacher: expected a teacher with soft or hard distillation, and none without; "
                f"got teacher {self.teacher} and distillation {self.distillation.kind}"
            )
