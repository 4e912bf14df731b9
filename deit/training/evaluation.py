"""Top-1 of a network on labelled images, for each of its heads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from deit import devices
from deit.commands.train import Eval
from deit.data.loader import Batch, Loader, in_order, naming_lost_workers
from deit.data.sources import open_source
from deit.model import DeiT, combine_heads
from deit.training.distillation import check_classes

HEADS = ("class", "distillation", "softmax-sum")


@dataclass(frozen=True)
class Scores:
    """Right answers in percent by head (section 5 of the paper has the three), and their loss."""

    top1: dict[str, float]
    loss: float  # cross-entropy of the head reported first, true labels, not smoothed
    images: int
    unreadable: int
    images_per_s: float

    @property
    def best_head(self) -> str:
        """What a distilled network is judged by, softmax-sum; another by its only head."""
        return "softmax-sum" if "softmax-sum" in self.top1 else "class"

    def text(self) -> str:
        """76.21 % (class), 77.02 % (distillation), ..."""
        return ", ".join(
            f"{value:.2f} %" + (f" ({head})" if len(self.top1) > 1 else "")
            for head, value in self.top1.items()
        )

    def row(self) -> dict[str, object]:
        """For a log."""
        return asdict(self)


def heads_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Images [B, 3, H, W] -> scores [B, C] by head."""
    if isinstance(model, DeiT) and model.config.distilled:
        before, model.test_head = model.test_head, "both"
        try:
            outputs = model(images)
        finally:
            model.test_head = before
        both = outputs[0], outputs[1]
        found = {"class": both[0], "distillation": both[1]}
        return found | {"softmax-sum": combine_heads(*both, "softmax-sum")}
    return {"class": model(images)}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
    stop: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Scores over `batches`; `model` comes back in the mode it was in.

    Args:
        precision: makes the autocast context of each batch.
        reduce: sums counts over processes.
        stop: asked before each batch; None is returned where it says so.

    Raises ValueError where no image could be read.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    right = torch.zeros(len(HEADS), dtype=torch.float64, device=device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, images, unreadable
    start, names = time.perf_counter(), ["class"]
    try:
        for batch in batches:
            if stop():
                return None
            totals[2] += len(batch.unreadable)
            if not len(batch.labels):
                continue
            with precision():
                scores = heads_of(model, batch.images)
            names = list(scores)
            for i, score in enumerate(scores.values()):
                right[i] += (score.argmax(-1) == batch.labels).sum()
            last = list(scores.values())[-1].float()
            totals[0] += nn.functional.cross_entropy(last, batch.labels, reduction="sum")
            totals[1] += len(batch.labels)
    finally:
        model.train(training)
    right, totals = reduce(right), reduce(totals)
    loss, images, unreadable = totals.tolist()
    if images == 0:
        raise ValueError("data: not one image could be read")
    return Scores(
        {name: 100.0 * float(right[i]) / images for i, name in enumerate(names)},
        loss / images,
        int(images),
        int(unreadable),
        images / (time.perf_counter() - start),
    )


def run(command: Eval) -> int:
    """`deit eval`: prints the scores; returns 0."""
    from deit.data.augment import evaluation_transform
    from deit.weights import networks

    model, about = networks.opened(command.weights, command.img_size)
    classes = about.get("classes")  # by which the network counts, whatever folders there are
    source = open_source(
        command.data, "val", None if classes is None else tuple(classes), command.limit
    )
    size = command.img_size or (
        model.config.img_size if isinstance(model, DeiT) else about["network"]["img_size"]
    )
    mean, std = about.get("mean", source.mean), about.get("std", source.std)
    device = devices.named(command.device)
    model.to(device)
    check_classes(model, torch.zeros(2, 3, size, size, device=device), len(source.classes))
    if command.fuse:
        networks.fuse(model)
    loader = Loader(
        source,
        evaluation_transform(size, networks.crop_of(about), tuple(mean), tuple(std)),
        in_order(len(source), command.batch_size),
        seed=0,
        workers=command.workers,
        device=device,
    )
    with naming_lost_workers():
        scores = evaluate(model, loader, precision=lambda: devices.autocast(device, command.dtype))
    assert scores is not None  # only a stop makes it None
    text = f"{scores.text()} of {scores.images:,} images right, {scores.images_per_s:.0f} images/s"
    if scores.unreadable:
        text += f"; {scores.unreadable} could not be read"
    print(json.dumps(scores.row()) if command.json else text)
    return 0
