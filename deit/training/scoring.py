"""What a run is judged by: its held-out scores, and its teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from deit.data.augment import evaluation_transform
from deit.data.loader import Loader, in_order
from deit.training import distributed
from deit.training.evaluation import Scores, evaluate

if TYPE_CHECKING:
    from deit.training.trainer import Trainer


def due(trainer: Trainer) -> bool:
    """Whether an evaluation belongs here that was not made, or not to its end."""
    epoch, within = divmod(trainer.update, trainer.plan.updates)
    last = trainer.update == trainer.total
    asked = within == 0 and epoch > 0 and (last or epoch % trainer.options.eval_every == 0)
    return asked and trainer.scored != trainer.made


def score(trainer: Trainer) -> None:
    """Evaluate the network, and its average where there is one; a stop leaves no trace of it."""
    row: dict[str, Any] = {}
    line = f"epoch {trainer.update // trainer.plan.updates}"
    models = {"model": distributed.plain(trainer.network)}
    if trainer.average is not None:
        models["average"] = trainer.average.module
    for name, model in models.items():
        scores = _scores(trainer, model, name)
        if scores is None:
            return
        row[name] = scores.row()
        line += f", {name}: {scores.text()}"
    trainer.scores, trainer.scored = row, trainer.made
    trainer.log(update=trainer.made, **row)
    trainer.watch.say(f"{line} of {row['model']['images']:,} held-out images right")


def latest(trainer: Trainer) -> str:
    """For the display: top-1 at the last evaluation, of the average where one is kept."""
    if not trainer.scores:
        return ""
    row = trainer.scores.get("average") or trainer.scores["model"]
    return f", top-1 {list(row['top1'].values())[-1]:.2f} %"


def score_teacher(trainer: Trainer) -> None:
    """What the teacher is worth, before anything is learned from it."""
    scores = None if trainer.teacher is None else _scores(trainer, trainer.teacher, "teacher")
    if scores is not None:
        trainer.watch.say(f"teacher: {scores.text()} of the held-out images right")
        trainer.log(update=0, teacher=scores.row())


def _scores(trainer: Trainer, model: nn.Module, name: str) -> Scores | None:
    """None where the processes agreed to stop, which every one of them asks at every batch."""
    batches = _held_out(trainer)
    done = 0

    def stop() -> bool:
        nonlocal done
        trainer.watch.update(f"evaluating the {name}, batch {done} of {len(batches)}")
        done += 1
        return trainer.agree_to_stop()

    return evaluate(
        model, batches, precision=trainer.precision, reduce=trainer.world.sum, stop=stop
    )


def _held_out(trainer: Trainer) -> Loader:
    source, world, options = trainer.held_out, trainer.world, trainer.options
    mine = in_order(len(source), max(1, trainer.plan.size), world.rank, world.size)
    mean, std = trainer.source.mean, trainer.source.std
    transform = evaluation_transform(options.img_size, options.recipe.eval_crop, mean, std)
    return trainer.loader(source, transform, None, mine)
