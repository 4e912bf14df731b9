"""A collection through a network into pieces of Parquet: `run`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import deit
from deit.batch.decoding import Decoded, Plan, Task, cores, decoded
from deit.batch.inputs import Inputs, Item
from deit.batch.model import Model
from deit.batch.pieces import Pieces, require
from deit.data.loader import naming_lost_workers
from deit.training.progress import Watch, human

ROWS = 4096


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    rows: int  # in all pieces, those of earlier runs too
    unreadable: int  # of these: rows with an error and no values
    made: int  # rows of this run
    seconds: float
    waited: float  # of these the network stood idle, for images to be decoded


def run(
    model: Model,
    inputs: Inputs,
    out: str | Path,
    *,
    topk: int | None = None,
    rows: int | None = None,
    workers: int | None = None,
    watch: Watch | None = None,
) -> Summary:
    """Write one row an image, in their order, into Parquet files of `rows` rows each.

    The columns: `path` (of a shard's member SHARD:MEMBER), what the model gives, and `error`,
    which is null where the image could be read; where not, the others are. A file appears when it
    is whole. A run that was killed, even by SIGKILL, goes on when it is called again with the same
    arguments; rows and bits are those of a run that nothing interrupted. `workers` and where it
    runs may change between, not its device's kind, nor torch's number of threads on a CPU.

    Args:
        model: with `output="embedding"` the column `embedding`, a list of fp32; likewise `logits`
            and `probabilities`.
        inputs: where the images come from; see `Inputs`.
        out: a new folder, or one of an earlier run with the same arguments.
        topk: with `output="probabilities"`: the columns `class` (ids, int32) and `score`
            (probabilities), lists of the likeliest `topk` classes, in the place of all classes.
        rows: of a file, a multiple of the model's batch_size; None: 4096, or the next multiple.
            This many are computed again at most after a kill.
        workers: processes that decode; 0 decodes in this one. None: one a usable core, at most 16.
        watch: is told the pace; None tells nobody.

    Raises:
        ValueError: a number outside its range; `topk` without probabilities; pyarrow missing; an
            `out` that is not of this run, in use, or within a glob; inputs that changed since; a
            shard that is not whole. Nothing is overwritten, and pieces that were made stay.
        OSError: a full disk, a worker that was killed (`WorkerDied`).
    """
    workers = min(cores(), 16) if workers is None else workers
    rows = -(-ROWS // model.batch_size) * model.batch_size if rows is None else rows
    _check(model, topk, rows, workers)
    inputs.check_apart(out)
    asked = _asked(model, inputs, topk, rows)
    start = time.perf_counter()
    # Outermost: a worker's death is reported once more wherever this process then is.
    with naming_lost_workers(), ExitStack() as stack:
        pieces = Pieces(out, asked)
        stack.callback(pieces.close)
        plan = Plan(inputs, pieces, rows, model.batch_size)
        pace = _Pace(plan, watch, inputs)
        writer = _Writer(pieces, stack.enter_context(ThreadPoolExecutor(1, "deit-writer")))
        batches = decoded(plan, model.reader, workers, model.device.type == "cuda")
        for task, errors, columns in _computed(model, topk, batches, pace):
            writer.add(task, errors, columns)
            pace.add(errors)
        writer.wait()
        if plan.fault is not None:
            raise plan.fault
        if not plan.seen:
            raise ValueError("images: there is no image in what was given")
        unreadable = plan.unreadable + pace.unreadable
        pieces.finish(plan.number, {"rows": plan.seen, "unreadable": unreadable})
    return Summary(plan.seen, unreadable, pace.made, time.perf_counter() - start, pace.waited)


def _check(model: Model, topk: int | None, rows: int, workers: int) -> None:
    require()
    if rows < 1 or rows % model.batch_size:
        raise ValueError(
            f"rows: expected a multiple of the batch size, {model.batch_size}; got {rows}"
        )
    if workers < 0:
        raise ValueError(f"workers: expected at least 0; got {workers}")
    if topk is None:
        return
    if model.output != "probabilities":
        raise ValueError(f"topk: expected a model of probabilities; got one of {model.output}")
    if not 1 <= topk <= model.width:
        raise ValueError(f"topk: expected 1 to {model.width}, the network's classes; got {topk}")


def _asked(model: Model, inputs: Inputs, topk: int | None, rows: int) -> dict[str, object]:
    """All that the rows and their bits depend on, as far as it is a choice."""
    return {
        **model.about(),
        "batch_size": model.batch_size,
        "rows": rows,
        "topk": topk,
        **inputs.about(),
        "version": deit.__version__,
    }


def _computed(
    model: Model, topk: int | None, batches: Iterator[tuple[Task, Decoded]], pace: _Pace
) -> Iterator[tuple[Task, list[str | None], dict[str, np.ndarray]]]:
    """Each task's columns. On a GPU a batch computes while the one before it is taken over."""
    before: tuple[Task, Decoded, Tensor | None] | None = None
    while True:
        start = time.perf_counter()
        following = next(batches, None)
        pace.waited += time.perf_counter() - start
        if following is not None:
            task, images = following
            found = model.compute(images.images) if len(images.images) else None
        if before is not None:
            yield _taken_over(model, topk, *before)
        if following is None:
            return
        before = task, images, found


def _taken_over(
    model: Model, topk: int | None, task: Task, images: Decoded, found: Tensor | None
) -> tuple[Task, list[str | None], dict[str, np.ndarray]]:
    errors = list(images.errors)
    good = np.array([i for i, error in enumerate(errors) if error is None], dtype=np.int64)
    if found is None:
        found = torch.zeros(0, model.width)
    for place in good[~found.isfinite().all(dim=1).cpu().numpy()]:
        errors[place] = model.not_finite
    parts: dict[str, Tensor] = {model.output: found}
    if topk is not None:
        scores, ids = found.topk(topk)
        parts = {"class": ids.int(), "score": scores}
    columns = {}
    for name, part in parts.items():
        here = part.cpu().numpy()
        columns[name] = np.zeros((len(errors), here.shape[1]), here.dtype)
        columns[name][good] = here
    return task, errors, columns


class _Writer:
    """Gathers a piece and writes it in a thread, while the next one is computed."""

    def __init__(self, pieces: Pieces, thread: ThreadPoolExecutor) -> None:
        self.pieces, self.thread = pieces, thread
        self.writing: Future[None] | None = None
        self._begin()

    def _begin(self) -> None:
        self.items: list[Item] = []
        self.errors: list[str | None] = []
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, task: Task, errors: list[str | None], columns: dict[str, np.ndarray]) -> None:
        self.items += task.items
        self.errors += errors
        self.parts.append(columns)
        if task.last:
            whole = {name: np.concatenate([part[name] for part in self.parts]) for name in columns}
            self.wait()  # two pieces in memory, and no more
            self.writing = self.thread.submit(
                self.pieces.write, task.piece, self.items, self.errors, whole
            )
            self._begin()

    def wait(self) -> None:
        """Raises what the writing raised."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None


class _Pace:
    """How far a run is and how fast it goes: by the last minute or so."""

    def __init__(self, plan: Plan, watch: Watch | None, inputs: Inputs) -> None:
        self.plan, self.watch, self.inputs = plan, watch, inputs
        self.counted: tuple[int, int] | None = None
        self.made = self.unreadable = 0
        self.waited = 0.0
        self.marks = deque([(time.perf_counter(), 0, 0.0)], maxlen=64)

    def add(self, errors: list[str | None]) -> None:
        self.made += len(errors)
        self.unreadable += sum(error is not None for error in errors)
        if self.watch is None:
            return
        if len(self.marks) == 1:  # after the workers were forked, and beside them
            threading.Thread(target=self._count, daemon=True).start()
        now = time.perf_counter()
        if now - self.marks[-1][0] >= 1.0 or len(self.marks) == 1:
            self.marks.append((now, self.made, self.waited))
        self.watch.update(self.line())

    def _count(self) -> None:
        with suppress(OSError, ValueError):  # the run itself will meet it
            self.counted = self.inputs.count()

    def line(self) -> str:
        (since, rows, waited), (now, made, idle) = self.marks[0], self.marks[-1]
        seconds = max(now - since, 1e-9)
        speed = (made - rows) / seconds
        done, total = self.plan.there + self.made, self._total()
        parts = [
            f"{done:,} images" if total is None else f"{done:,} of {total:,} images",
            f"{speed:.1f}/s",
            f"waiting for decoding {100 * (idle - waited) / seconds:.0f} %",
        ]
        if bad := self.plan.unreadable + self.unreadable:
            parts.append(f"{bad:,} unreadable")
        if total is not None and speed > 0:
            parts.append(f"{human((total - done) / speed)} left")
        return ", ".join(parts)

    def _total(self) -> int | None:
        """Images in all; by the mean of the shards read so far where there are shards."""
        if self.counted is None:
            return None
        images, shards = self.counted
        if not shards:
            return images
        if not self.plan.shards:
            return None
        mean = self.plan.in_shards / self.plan.shards
        return max(images + round(shards * mean), self.plan.seen)
