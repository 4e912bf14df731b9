"""`deit eval`: top-1 of a network on labelled images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deit.commands import flags
from deit.training.options import WORKERS


@dataclass(frozen=True)
class Eval:
    """Top-1 of a network on labelled images, for each of its heads."""

    weights: flags.Positional[Path]
    """A run's folder, a weights' file in it (average.safetensors), or a DeiT's weights."""
    data: str
    """As for `deit train`; the val part is taken."""
    img_size: flags.OptionalInt = None
    """Pixels along a side; the network's own if left out."""
    batch_size: int = 64
    """Images at a time."""
    limit: flags.OptionalInt = None
    """Evaluate on this many images, not all."""
    device: str = "auto"
    """A torch device; auto is the first GPU, or the CPU where there is none."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What products are computed in (autocast)."""
    workers: int = WORKERS
    """Processes that read images."""
    fuse: bool = True
    """Run on the fused operators."""
    json: bool = False
    """Print one JSON document instead of text."""

    def run(self) -> int:
        """Print the scores; returns 0."""
        import torch

        from deit import devices
        from deit.data.augment import evaluation_transform
        from deit.data.loader import Loader, in_order, naming_lost_workers
        from deit.data.sources import open_source
        from deit.model import DeiT
        from deit.training import assemble
        from deit.training.distillation import check_classes
        from deit.training.evaluation import evaluate
        from deit.weights import networks

        model, about = networks.opened(self.weights, self.img_size)
        classes = about.get("classes")  # the network counts by these, whatever folders there are
        source = open_source(
            self.data, "val", None if classes is None else tuple(classes), self.limit
        )
        size = self.img_size or (
            model.config.img_size if isinstance(model, DeiT) else about["network"]["img_size"]
        )
        mean, std = about.get("mean", source.mean), about.get("std", source.std)
        device = devices.named(self.device)
        model.to(device)
        check_classes(model, torch.zeros(2, 3, size, size, device=device), len(source.classes))
        if self.fuse:
            assemble.fuse(model)
        loader = Loader(
            source,
            evaluation_transform(size, networks.crop_of(about), tuple(mean), tuple(std)),
            in_order(len(source), self.batch_size),
            seed=0,
            workers=self.workers,
            device=device,
        )
        with naming_lost_workers():
            scores = evaluate(model, loader, precision=lambda: devices.autocast(device, self.dtype))
        assert scores is not None  # only a stop makes it None
        text = (
            f"{scores.text()} of {scores.images:,} images right, {scores.images_per_s:.0f} images/s"
        )
        if scores.unreadable:
            text += f"; {scores.unreadable} could not be read"
        print(json.dumps(scores.row()) if self.json else text)
        return 0
