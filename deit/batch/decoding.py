"""Images decoded ahead in worker processes, in their order, as the pieces want them."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit.batch.images import Reader
from deit.batch.inputs import Item
from deit.batch.pieces import Pieces
from deit.data.decoding import UnreadableImage, keep_memory
from deit.data.loader import begin_worker


@dataclass(frozen=True)
class Task:
    """Images that go through the network together: part of one piece."""

    piece: int
    items: list[Item]
    last: bool  # of the piece


@dataclass
class Decoded:
    """A task's images."""

    images: Tensor  # uint8 [readable, 3, size, size]
    errors: list[str | None]  # of every image of the task
    seconds: float  # of one worker

    def pin_memory(self) -> Decoded:
        """Called by DataLoader."""
        return Decoded(self.images.pin_memory(), self.errors, self.seconds)


@dataclass
class Plan:
    """The tasks of the pieces that are missing, made as they are asked for.

    The same images share a forward whatever the number of workers and however often the run was
    killed, so that bits do not depend on it.
    """

    inputs: Iterable[Item]
    pieces: Pieces
    rows: int  # of a piece
    batch_size: int
    waiting: deque[Task] = field(default_factory=deque)  # handed out, not come back
    seen: int = 0  # images whose names were read
    shards: int = 0  # of which all names were read
    in_shards: int = 0  # their images
    there: int = 0  # images in pieces that were there
    unreadable: int = 0  # of those
    fault: Exception | None = None  # what ended the names early

    def __iter__(self) -> Iterator[Task]:
        """Ends at a `fault`, such as a shard that is not whole: what came before is still in work,
        some batches ahead of the network, and its pieces are to be written."""
        try:
            yield from self._tasks()
        except (ValueError, OSError) as error:
            self.fault = error

    def _tasks(self) -> Iterator[Task]:
        stream = self._counted()
        for number in itertools.count():
            items = list(itertools.islice(stream, self.rows))
            if not items:
                return
            if number in self.pieces.there:
                self.unreadable += self.pieces.check(number, items)
                self.there += len(items)
                continue
            for start in range(0, len(items), self.batch_size):
                end = start + self.batch_size
                task = Task(number, items[start:end], end >= len(items))
                self.waiting.append(task)
                yield task

    @property
    def number(self) -> int:
        """Pieces of all images seen."""
        return -(-self.seen // self.rows)

    def _counted(self) -> Iterator[Item]:
        shard, inside = "", 0
        for item in self.inputs:
            if item.file != shard:
                if inside:
                    self.shards += 1
                    self.in_shards += inside
                shard, inside = item.file, 0
            inside += item.size is not None
            self.seen += 1
            yield item


class _Decoding(Dataset[Decoded]):
    """Runs in the worker processes."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, task: Task) -> Decoded:
        start = time.perf_counter()
        images: list[Tensor] = []
        errors: list[str | None] = []
        for item in task.items:
            try:
                images.append(self.reader(item.encoded(), item.name))
                errors.append(None)
            except UnreadableImage as error:
                errors.append(error.reason)
        stacked = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)
        return Decoded(stacked, errors, time.perf_counter() - start)


def _as_it_is(decoded: Any) -> Any:
    return decoded


def _begin(worker: int) -> None:
    begin_worker(worker)
    keep_memory()


def cores() -> int:
    """Those that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


def decoded(plan: Plan, reader: Reader, workers: int, pin: bool) -> Iterator[tuple[Task, Decoded]]:
    """Each task with its images, in order. To be used within `naming_lost_workers`."""
    loader: DataLoader[Any] = DataLoader(
        _Decoding(reader),
        batch_size=None,
        sampler=plan,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_begin,
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except (ConnectionError, EOFError) as error:  # torch looks for a death before the end
            raise RuntimeError(f"DataLoader worker exited within a batch: {error!r}") from error
        if batch is None:
            return
        yield plan.waiting.popleft(), batch
