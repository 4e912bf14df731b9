"""Batches of augmented, labelled images, decoded ahead in worker processes."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit.data.augment import Transform, seeded
from deit.data.decoding import UnreadableImage
from deit.data.drawn import Drawing
from deit.data.on_device import Augmentation, Drawn
from deit.data.sampling import Batches, Draw
from deit.data.sources import Source, check_labels


class WorkerDied(OSError):
    """A process that reads images was killed, by the system for its memory as a rule."""


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Within: a worker's death raises WorkerDied; torch reports it wherever this process is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        # While the loader lives, in a frame of the traceback, torch raises again at the next end of
        # any child.
        traceback.clear_frames(error.__traceback__)
        raise WorkerDied(f"workers: {error}") from None


@dataclass
class Batch:
    """Samples that could be read, and the names and reasons of those that could not."""

    images: Tensor  # [B, 3, H, W], fp32, normalised; from a worker that only draws, uint8
    labels: Tensor  # [B], int64
    draws: list[Draw]
    drawn: list[Drawn] = field(default_factory=list)  # what is left to the device, if anything
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0  # of one worker's time, to read and augment it

    def to(self, device: torch.device) -> Batch:
        """On `device`; copies from pinned memory overlap with what runs there."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Called by DataLoader."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class _Item(NamedTuple):
    draw: Draw
    image: Tensor | None
    drawn: Drawn | None
    label: int
    fault: tuple[str, str] | None  # name and reason
    seconds: float


class _Augmented(Dataset[_Item]):
    """Reads and augments one sample, or draws how, in a worker process."""

    def __init__(self, source: Source, transform: Transform | Drawing, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, draw: Draw) -> _Item:
        start = time.perf_counter()
        try:
            image, label = self.source.read(draw.image)
            with seeded(self.seed, draw.epoch, draw.image, draw.view):
                made = self.transform(image)
        except UnreadableImage as error:  # too elongated to be resized, too
            fault = self.source.name(draw.image), error.reason
            return _Item(draw, None, None, -1, fault, time.perf_counter() - start)
        tensor, drawn = made if isinstance(made, tuple) else (made, None)
        return _Item(draw, tensor, drawn, label, None, time.perf_counter() - start)


def _collate(items: list[_Item]) -> Batch:
    images = [item.image for item in items if item.image is not None]
    good = [item for item in items if item.image is not None]
    return Batch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([item.label for item in good], dtype=torch.int64),
        [item.draw for item in good],
        [item.drawn for item in good if item.drawn is not None],
        [item.fault for item in items if item.fault is not None],
        sum(item.seconds for item in items),
    )


def begin_worker(_: int) -> None:
    """A DataLoader's worker_init_fn: leaves signals to the main process."""
    # The main process answers a signal to the process group: it finishes its update, for
    # which it may still need batches. Workers end with it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Loader:
    """Iterates over the batches of `batches`, once; `waited` is how long the caller stood still.

    To be used within `naming_lost_workers`, whatever runs between the batches included.
    The same samples come out for any number of workers.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | Drawing,
        batches: Batches | list[list[Draw]],
        *,
        seed: int,
        workers: int,
        device: torch.device,
        augmentation: Augmentation | None = None,
    ) -> None:
        """`augmentation`: does on the device what a `transform` that only draws has drawn."""
        if workers < 0:
            raise ValueError(f"workers: expected at least 0; got {workers}")
        self.source, self.device, self.augmentation = source, device, augmentation
        self.waited = 0.0
        self.data: DataLoader[_Item] = DataLoader(
            _Augmented(source, transform, seed),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if workers else None,
            worker_init_fn=begin_worker,
        )

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        """Raises ValueError for a label that is none of the source's classes."""
        check_labels(self.source)
        batches = iter(self.data)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches, None)
            except (ConnectionError, EOFError) as error:  # torch looks for a death before the end
                raise RuntimeError(f"DataLoader worker exited within a batch: {error!r}") from error
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            batch = batch.to(self.device)
            if self.augmentation is not None and batch.drawn:
                batch.images = self.augmentation(batch.images, batch.drawn)
            yield batch


def in_order(count: int, batch_size: int, rank: int = 0, processes: int = 1) -> list[list[Draw]]:
    """Every image once, in order, for evaluation: the batches of one process.

    Every process gets the same number of batches, and none is empty: where weights are sharded
    (FSDP2), each forward is a collective. Raises ValueError for fewer images than processes.
    """
    if count < processes:
        raise ValueError(f"data: expected an image for each of {processes} processes; got {count}")
    number = -(-count // (batch_size * processes))
    parts = np.array_split(np.arange(rank, count, processes), number)
    return [[Draw(0, int(i), 0, int(i), 0) for i in part] for part in parts if len(part)]
