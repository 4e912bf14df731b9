"""Real photographs through the whole path: decoded, resized, normalised and classified; or, in
training, decoded, augmented by the paper's recipe and learnt from.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.data.augment import training_transform
from deit.data.images import PhotoLoader, find_images
from deit.data.loader import Loader, in_order, naming_lost_workers
from deit.data.sources import Folder
from deit.recipes import DEIT
from evidence.timing import Spread, interleave, spread
from race.contenders import Contender
from race.race import Race

ROUNDS = 3
MOST_BATCHES = 8  # in one pass; enough for decoding to run ahead of the model


@dataclass
class Photographs:
    """What was read, and the speeds, in images/s over rounds of one pass each."""

    files: int
    used: int
    images: int  # of one pass, repeats included
    unreadable: list[str]  # "name (reason)"
    workers: int
    augmented: bool
    loader: Spread
    model: dict[str, Spread] = field(default_factory=dict)  # by the contender's variant
    end_to_end: dict[str, Spread] = field(default_factory=dict)

    def row(self, variant: str) -> dict[str, Any] | None:
        """The fields of an evidence row for one contender; None where it did not run."""
        if variant not in self.model:
            return None
        return {
            "files": self.files,
            "used": self.used,
            "images_a_pass": self.images,
            "unreadable": self.unreadable,
            "workers": self.workers,
            "augmented": self.augmented,
            "n": self.loader.n,
            "loader_img_per_s": self.loader.median,
            "model_img_per_s": self.model[variant].median,
            "end_to_end_img_per_s": self.end_to_end[variant].median,
        }


class TrainingLoader:
    """The photographs by the trainer's own loader: any passes, each over all of them.

    Its processes are as many as a PhotoLoader would have. Raises ValueError as that does.
    """

    def __init__(self, paths: Sequence[Path], size: int, batch: int, device: torch.device) -> None:
        self.workers = PhotoLoader(paths, size, batch).workers
        self.source = Folder(list(paths), [0] * len(paths), ("photograph",))
        transform = training_transform(DEIT, size, self.source.mean, self.source.std)
        self.loader = Loader(
            self.source, transform, in_order(len(paths), batch),
            seed=0, workers=self.workers, device=device,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Batches [B, 3, size, size] of different views, and their files' names."""
        with naming_lost_workers():
            for batch in self.loader:
                yield batch.images, [self.source.name(draw.image) for draw in batch.draws]


def measure(race: Race, contenders: Sequence[Contender], paths: Sequence[Path]) -> Photographs:
    """Time the loader alone, each model alone on decoded photographs, and both together.

    Args:
        race: gives the clock, the budget and the progress display.
        contenders: of one network, fixed to one batch.
        paths: files as `find_images` returns them.

    Raises ValueError where not one file can be read.
    """
    batch, size = contenders[0].batch, contenders[0].network.img_size
    race.progress.doing("reading photographs", f"{len(paths)} files")
    began = time.perf_counter()
    survey = PhotoLoader(paths[: batch * MOST_BATCHES], size, batch)
    good = list(itertools.chain.from_iterable(names for _, names in survey))
    decode = (time.perf_counter() - began) / len(good)
    batches = _batches(race, contenders, batch, decode)
    cycled = list(itertools.islice(itertools.cycle(good), batch * batches))
    if len(good) < len(cycled):
        race.note(f"{len(good)} photographs are cycled through to make {len(cycled)} images")
    settings = race.settings
    loader: PhotoLoader | TrainingLoader
    if settings.train:
        loader = TrainingLoader(cycled, size, batch, settings.device)
    else:
        loader = PhotoLoader(cycled, size, batch, device=settings.device, dtype=settings.dtype)
    samples = _rounds(race, contenders, loader)
    speeds = [spread([len(cycled) / seconds for seconds in each]) for each in samples]
    names = [contender.variant for contender in contenders]
    return Photographs(
        files=len(paths),
        used=len(good),
        images=len(cycled),
        unreadable=[f"{bad.path.name} ({bad.reason})" for bad in survey.unreadable],
        workers=loader.workers,
        augmented=settings.train,
        loader=speeds[0],
        model=dict(zip(names, speeds[1::2], strict=True)),
        end_to_end=dict(zip(names, speeds[2::2], strict=True)),
    )


def _batches(race: Race, contenders: Sequence[Contender], batch: int, decode: float) -> int:
    """Batches in a pass: what --seconds and the budget allow, from 2 to MOST_BATCHES."""
    seconds, left = race.settings.seconds, race.left() + race.settings.keep
    wanted = float(MOST_BATCHES)
    if seconds is not None:
        wanted = min(wanted, seconds / (batch * max(c.image_seconds for c in contenders)))
    if not math.isinf(left):
        each = ROUNDS * batch * sum(2 * c.image_seconds + 2 * decode for c in contenders)
        wanted = min(wanted, left / each)
    return max(2, int(wanted))  # with one, decoding could not run beside the model


def _rounds(
    race: Race, contenders: Sequence[Contender], loader: PhotoLoader | TrainingLoader
) -> list[list[float]]:
    """Seconds a pass: the loader, then for each contender its model alone and the whole path."""
    batches = len(loader)
    photographs, _ = next(iter(loader))

    def whole(contender: Contender | None, turn: int) -> float:
        race.clock.synchronize()
        start = time.perf_counter()
        for images, _ in loader:
            if contender is not None:
                race.call(contender, images)
        race.clock.synchronize()
        return time.perf_counter() - start

    def model(contender: Contender, turn: int) -> float:
        return race.clock.time(lambda: race.call(contender, photographs), batches) * batches

    steps = [functools.partial(whole, None)]
    for contender in contenders:
        steps += [functools.partial(model, contender), functools.partial(whole, contender)]

    keep = race.settings.keep
    began = time.perf_counter()

    def before(turn: int) -> None:
        each = (time.perf_counter() - began) / max(turn, 1)
        race.progress.left(each * (ROUNDS - turn) if turn else None)
        race.progress.doing("photographs", f"round {turn + 1} of {ROUNDS}")

    return interleave(steps, ROUNDS, before=before, enough=lambda _: race.left() + keep < 0)


def folder(path: Path) -> list[Path]:
    """The image files under a folder.

    Raises ValueError where it is missing, no folder, or holds no file that can be read.
    """
    if not path.is_dir():
        raise ValueError(f"images: expected a folder; got {path}")
    paths = find_images(path)
    next(iter(PhotoLoader(paths, size=16, batch_size=1, workers=0)))  # raises where none is good
    return paths
