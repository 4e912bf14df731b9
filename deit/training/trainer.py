"""Training: `deit train`, or `torchrun ... -m deit.train` for many processes.

`train` reads top to bottom as what happens: the data, the networks, then one update after
another. Everything random follows from (seed, update) or a sample's own counters, so a run
that stops and goes on is bit for bit the run that did not stop.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import torch

from deit import devices
from deit.data.augment import evaluation_transform, mix, training_transform
from deit.data.drawn import split
from deit.data.loader import Batch, Loader, in_order, naming_lost_workers
from deit.data.on_device import Augmentation
from deit.data.sampling import Batches, Plan, stream
from deit.data.sources import Source, check_labels, open_source
from deit.training import assemble, checkpoints, choices, distributed, resume
from deit.training.checkpoints import Checkpoints
from deit.training.distillation import Objective
from deit.training.evaluation import Evaluation
from deit.training.learner import Learner
from deit.training.options import Options
from deit.training.progress import Pace, Watch, human
from deit.training.runs import RunFolder
from deit.training.trackers import Trackers
from deit.weights.files import write_atomically


class NotFinite(ValueError):
    """The loss became NaN or infinite; the message says where its batch is named."""


class TooManyUnreadable(ValueError):
    """More images than the stated share could not be read."""


def train(options: Options) -> dict[str, Any]:
    """Train a network as `options` say, from the newest checkpoint in `options.out` if any.

    Returns:
        The last evaluation: {"update", "model": scores, "average": scores or None, "finished"};
        finished is False where SIGTERM or Ctrl-C ended the run after a checkpoint, which they do
        where this is called from the main thread.

    Raises:
        ValueError: bad options or data; NotFinite; TooManyUnreadable. OSError: the folder
        cannot be written; WorkerDied.
    """
    with distributed.join(options.device) as world, naming_lost_workers(), choices.scoped():
        watch, trainer = Watch(world.first), None
        try:
            trainer = Trainer(options, world, watch)
            return trainer.run()
        finally:
            watch.close()
            if trainer is not None:
                trainer.trackers.close()


class Trainer:
    """One run under way. `run` is the loop, `step` one update.

    A signal reaches one process and at any time: `signalled` is what this one has heard,
    `stopping` what all have agreed on, in `step` and at every batch of an evaluation.
    """

    def __init__(self, options: Options, world: distributed.World, watch: Watch) -> None:
        self.options, self.world, self.watch = options, world, watch
        self.recipe = options.recipe
        self.folder = RunFolder(options.out, options.keep)
        self.source = open_source(options.data, "train", limit=options.limit_train)
        self.held_out = open_source(
            options.data, "val", self.source.classes, limit=options.limit_val
        )
        for source in (self.source, self.held_out):  # the second is not read for an epoch
            check_labels(source)
        pieces = world.size * options.accumulate
        self.plan = Plan(
            len(self.source), self.recipe.batch_size, self.recipe.repeats, options.seed, pieces
        )
        self.augment = self._augment()
        torch.manual_seed(options.seed)
        model = assemble.network(options, len(self.source.classes)).to(world.device)
        if options.train_only == "classifier":
            assemble.freeze(model)
        self.teacher = assemble.teacher(options, self.source, world.device)
        self.objective = Objective(
            options.distillation,
            label_smoothing=self.recipe.label_smoothing,
            loss=self.recipe.loss,
            impl="auto" if options.fuse else "reference",
        )
        if options.fuse:
            choices.take_up(self.folder, world, watch.say)
        self.learner = Learner(model, options, world, self.plan.updates, watch.say)
        self.checkpoints = Checkpoints(self.folder, self.learner, watch.say)
        self.evaluation = Evaluation(
            self._held_out, self._precision, world.sum, self._agree_to_stop, watch.update
        )
        self.trackers = Trackers((), options.out)
        # `update` counts in this plan, `made` over all that the run has had: another batch size
        # makes another plan.
        self.update, self.total = 0, self.recipe.epochs * self.plan.updates
        self.shift = 0
        self.settled = False  # finished by an earlier call: nothing is to be done or written
        self.unreadable: dict[str, str] = {}
        self.signalled = self.stopping = False

    @property
    def made(self) -> int:
        """Updates that were made: the number that checkpoints and the log go by."""
        return self.update - self.shift

    def run(self) -> dict[str, Any]:
        """From the newest checkpoint to the last epoch, or to a signal."""
        with self._signals():
            self._begin()
            batches = self._batches()
            loader, parts = iter(batches), self.options.accumulate
            pace = Pace(self.world.size, self.options.workers)
            if self._evaluation_due():  # the evaluation that a signal ended
                self._evaluate()
            while self.update < self.total and not self.stopping:
                waited = batches.waited
                loss, self.stopping = self.step(list(islice(loader, parts)), pace)
                self.update += 1
                seconds, due = pace.end(loss, batches.waited - waited), self._evaluation_due()
                if seconds > 1.0 or due:
                    pace = self._show(pace)
                if due and not self.stopping:
                    self._evaluate()
                    pace = pace.again()  # an evaluation is no training time
                epoch, within = divmod(self.update, self.plan.updates)
                if self.stopping or (within == 0 and epoch % self.options.save_every == 0):
                    self._save()
        finished = self.update >= self.total and not self.stopping
        if not finished:
            self.watch.say(f"stopped by a signal after update {self.made}; run it again to go on")
        elif not self.settled:
            self.checkpoints.finish()
        return {"update": self.made, "finished": finished, **self.evaluation.scores}

    def step(self, parts: list[Batch], pace: Pace) -> tuple[float, bool]:
        """One update; returns its loss over all processes, and whether any of them was stopped."""
        seeds = stream(self.options.seed, self.update, 2, self.world.rank).generate_state(1)
        torch.manual_seed(int(seeds[0]))  # stochastic depth
        self.learner.schedule.step_update(self.update)
        facts = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(parts):
            self._count(batch, pace)
            with distributed.accumulating(self.learner.network, last=number == len(parts) - 1):
                loss = self._loss(batch) / len(parts)
                self.learner.backward(loss)
            facts[0] += loss.detach()
        facts[1] = float(self.signalled)
        facts = self.world.sum(facts)
        value, stop = float(facts[0]) / self.world.size, bool(facts[1] > 0)
        if math.isfinite(value):
            self.learner.apply(self.made)
        else:
            self._not_finite(value, parts)
        self.learner.optimizer.zero_grad(set_to_none=True)
        return value, stop

    def _loss(self, batch: Batch) -> torch.Tensor:
        images, target = mix(
            batch.images,
            batch.labels,
            batch.draws,
            len(self.source.classes),
            self.recipe,
            self.options.seed,
        )
        with self._precision():
            teacher = None if self.teacher is None else self.teacher(images)
            outputs = self.learner.network(images)
        return self.objective(outputs, target, teacher)

    def _not_finite(self, value: float, parts: list[Batch]) -> None:
        """Name the batch of a loss that is NaN or infinite; then stop, unless told to go on."""
        names = [self.source.name(draw.image) for batch in parts for draw in batch.draws]
        draws = [list(draw) for batch in parts for draw in batch.draws]
        path = self.folder.root / f"not-finite-{self.made:08d}-rank{self.world.rank}.json"
        facts = {"update": self.made, "loss": str(value), "images": names, "draws": draws}
        path.parent.mkdir(parents=True, exist_ok=True)  # another node may not have the folder
        write_atomically(path, json.dumps(facts, indent=1))
        message = f"loss: {value} at update {self.made}; its images are named in {path}"
        if self.options.on_nan == "stop":
            raise NotFinite(message)
        self.watch.say(f"{message}; the update is skipped")
        self.log(update=self.made, skipped=str(value))

    def _agree_to_stop(self) -> bool:
        """Whether any process was told to stop; every process has to ask at the same place."""
        self.stopping = self.stopping or self.world.any(self.signalled)
        return self.stopping

    def _augment(self) -> tuple[Any, Augmentation | None]:
        """What the workers do to an image, and what is left to the device."""
        how = (self.recipe, self.options.img_size, self.source.mean, self.source.std)
        if self.options.augment_on == "workers":
            return training_transform(*how), None
        return split(*how, self.world.device)

    def _batches(self) -> Loader:
        batches = Batches(
            self.plan,
            self.recipe.epochs,
            start=self.update,
            rank=self.world.rank,
            processes=self.world.size,
        )
        return self._loader(self.source, *self.augment, batches)

    def _held_out(self) -> Loader:
        world, options, source = self.world, self.options, self.source
        mine = in_order(len(self.held_out), max(1, self.plan.size), world.rank, world.size)
        transform = evaluation_transform(
            options.img_size, self.recipe.eval_crop, source.mean, source.std
        )
        return self._loader(self.held_out, transform, None, mine)

    def _loader(
        self, source: Source, transform: Any, augmentation: Augmentation | None, batches: Any
    ) -> Loader:
        """Reads `batches` of `source` on this process's share of the machine."""
        return Loader(
            source,
            transform,
            batches,
            seed=self.options.seed,
            workers=self.options.workers,
            device=self.world.device,
            augmentation=augmentation,
        )

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast to the dtype asked for."""
        return devices.autocast(self.world.device, self.options.dtype)

    def _begin(self) -> None:
        """Go on from the newest checkpoint, if any; then write down what is trained now.

        All is checked before anything is written. A run that has nothing left to do writes nothing.
        """
        options, plan, first = self.options, self.plan, self.world.first
        about: dict[str, Any] = {}
        if first:
            about = checkpoints.about(options, self.source, self.held_out, self.learner)
        found = self.checkpoints.take_up(about, plan, self.total)
        if found is not None:
            self.update, self.shift = found.update, found.update - found.made
            self.unreadable, self.settled = found.unreadable, found.settled
            self.evaluation.take_up(found.scored, found.scores)
        if self.settled:
            return
        if first:
            made = None if found is None else found.made
            self.folder.root.mkdir(parents=True, exist_ok=True)
            self.trackers = Trackers(options.track, self.folder.root, made)
            self.folder.begin(about, choices.record(self.world) if options.fuse else None)
            self.folder.rewind(made)
        self.watch.say(
            f"{options.arch}, {self.learner.parameters:,} parameters; {len(self.source):,} images "
            f"of {len(self.source.classes)} classes; {plan.updates} updates an epoch, "
            f"{self.total} in all, {plan.size * plan.pieces} images each; "
            f"{self.world.size} x {self.world.device}, {options.dtype}, {options.workers} workers"
        )
        if self.update == 0:
            self._evaluate_teacher()

    def _save(self) -> None:
        """Write a checkpoint; on a full disk say so and go on, unless this was the last chance."""
        place = resume.place(self.plan, self.update)
        try:
            self.checkpoints.save(self.made, self.unreadable, place)
        except OSError as error:
            if self.stopping:
                raise
            self.watch.say(f"no checkpoint after update {self.made}: {error}")
            self.log(update=self.made, checkpoint=str(error))
        self.world.wait()

    def _evaluation_due(self) -> bool:
        """Whether an evaluation belongs here that was not made, or not to its end."""
        epoch, within = divmod(self.update, self.plan.updates)
        last = self.update == self.total
        asked = within == 0 and epoch > 0 and (last or epoch % self.options.eval_every == 0)
        return asked and self.evaluation.made != self.made

    def _evaluate(self) -> None:
        """Evaluate the network, and its average where there is one, unless told to stop."""
        text = self.evaluation.score(self.learner.models, self.made)
        if text is not None:
            self.log(update=self.made, **self.evaluation.scores)
            self.watch.say(f"epoch {self.update // self.plan.updates}, {text}")

    def _evaluate_teacher(self) -> None:
        """What the teacher is worth, before anything is learned from it."""
        scores = None if self.teacher is None else self.evaluation.of(self.teacher, "teacher")
        if scores is not None:
            self.watch.say(f"teacher: {scores.text()} of the held-out images right")
            self.log(update=0, teacher=scores.row())

    def _count(self, batch: Batch, pace: Pace) -> None:
        """Add a batch to the display's sums, and its unreadable images to the log."""
        pace.add(batch)
        for name, reason in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self.log(update=self.made, unreadable=name, reason=reason)
        share = len(self.unreadable) / len(self.source)
        if share > self.options.max_unreadable or not len(batch.labels):
            name, reason = next(iter(self.unreadable.items()))
            raise TooManyUnreadable(
                f"data: {len(self.unreadable)} of {len(self.source)} images could not be read, "
                f"more than max_unreadable={self.options.max_unreadable} allows; for instance "
                f"{name} ({reason})"
            )

    def _show(self, pace: Pace) -> Pace:
        row, lr = pace.row(), self.learner.lr
        left = (self.total - self.update) * row.pop("seconds_an_update")
        self.watch.update(
            f"epoch {self.update / self.plan.updates:.2f} of {self.recipe.epochs}, update "
            f"{self.made}: loss {row['loss']:.4f}{self.evaluation.latest}, lr {lr:.2e}, "
            f"{row['images_per_s']:.0f} "
            f"images/s (loader {row['loader_images_per_s']:.0f}, waited for "
            f"{row['waited_percent']:.0f} %), about {human(left)} left"
        )
        self.log(update=self.made, lr=lr, **row)
        return pace.again()

    def log(self, **entry: Any) -> None:
        """One line of the run's log, and its numbers to the trackers asked for."""
        if self.world.first:
            try:
                self.folder.log(**entry)
            except OSError as error:
                self.watch.say(f"a line of the log is lost: {error}")
            self.trackers.add(entry)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after this update or batch, with a checkpoint.

        Python hears them in the main thread alone: in another one they stay what they were.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            self.signalled = True

        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
