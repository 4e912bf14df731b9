"""Top-1 of a network on labelled images, for each of its heads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deit.data.loader import Batch, Loader
from deit.model import DeiT, combine_heads

HEADS = ("class", "distillation", "softmax-sum")


@dataclass(frozen=True)
class Scores:
    """Right answers in percent by head (section 5 of the paper has the three), and their loss."""

    top1: dict[str, float]
    loss: float  # cross-entropy of the head reported first, true labels, not smoothed
    images: int
    unreadable: int
    images_per_s: float

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


@dataclass
class Evaluation:
    """A run's held-out images, and what its networks had right on them last.

    Args:
        batches: makes a reader of the images, this process's share of them.
        precision, reduce, stop: as for `evaluate`.
        show: told how far it is.
        made: updates that were made when `scores` were; 0 before the first.
        scores: `Scores.row` by network.
    """

    batches: Callable[[], Loader]
    precision: Callable[[], AbstractContextManager[object]]
    reduce: Callable[[Tensor], Tensor]
    stop: Callable[[], bool]
    show: Callable[[str], None]
    made: int = 0
    scores: dict[str, Any] = field(default_factory=dict)

    def take_up(self, made: int, scores: dict[str, Any]) -> None:
        """Go on from an earlier process's last scores."""
        self.made, self.scores = made, scores

    def of(self, model: nn.Module, name: str) -> Scores | None:
        """None where the processes agreed to stop, which every one of them asks at every batch."""
        batches, done = self.batches(), 0

        def stop() -> bool:
            nonlocal done
            self.show(f"evaluating the {name}, batch {done} of {len(batches)}")
            done += 1
            return self.stop()

        return evaluate(model, batches, precision=self.precision, reduce=self.reduce, stop=stop)

    def score(self, models: Mapping[str, nn.Module], made: int) -> str | None:
        """Score the networks after `made` updates, and say what they had right.

        None, and no trace of it, where the processes agreed to stop.
        """
        found = {}
        for name, model in models.items():
            scores = self.of(model, name)
            if scores is None:
                return None
            found[name] = scores
        self.made, self.scores = made, {name: scores.row() for name, scores in found.items()}
        texts = ", ".join(f"{name}: {scores.text()}" for name, scores in found.items())
        return f"{texts} of {found['model'].images:,} held-out images right"

    @property
    def latest(self) -> str:
        """For the display: top-1 at the last evaluation, of the average where one is kept."""
        if not self.scores:
            return ""
        row = self.scores.get("average") or self.scores["model"]
        return f", top-1 {list(row['top1'].values())[-1]:.2f} %"
