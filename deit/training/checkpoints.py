"""What a run keeps: its description, its checkpoints, its final weights."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from deit.data.sampling import Plan
from deit.model import DeiT
from deit.training import distributed
from deit.training import resume as resuming
from deit.training.runs import State, load_state, write_tensors
from deit.training.trackers import Trackers
from deit.weights import checkpoint

if TYPE_CHECKING:
    from deit.training.trainer import Trainer


def _about(trainer: Trainer) -> dict[str, Any]:
    """What `run.json` says, as it reads it again."""
    model = distributed.plain(trainer.network)
    # Whoever reads a checkpoint's weights needs what no shape shows: heads, epsilon.
    shape = {"config": asdict(model.config)} if isinstance(model, DeiT) else {}
    about = {
        "network": {"arch": trainer.options.arch, "img_size": trainer.options.img_size, **shape},
        "classes": trainer.source.classes,
        "mean": trainer.source.mean,
        "std": trainer.source.std,
        "images": len(trainer.source),
        "images_digest": resuming.digest(trainer.source),
        "held_out_images": len(trainer.held_out),
        "options": asdict(trainer.options),
        "parameters": trainer.size,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    return json.loads(json.dumps(about, default=str))


def save(trainer: Trainer) -> None:
    """Write a checkpoint; on a full disk say so and go on, unless this was the last chance."""
    model, average = distributed.model_state(trainer.network), None
    if trainer.average is not None:
        average = distributed.model_state(trainer.average.module)
    rest = {
        "optimizer": distributed.optimizer_state(trainer.network, trainer.optimizer),
        "scaler": trainer.scaler.state_dict(),
        "unreadable": trainer.unreadable,
        "plan": resuming.place(trainer.plan, trainer.update),
    }
    if trainer.world.first:
        try:
            trainer.folder.save(State(trainer.made, model, average, rest))
        except OSError as error:
            if trainer.stopping:
                raise
            trainer.watch.say(f"no checkpoint after update {trainer.made}: {error}")
            trainer.log(update=trainer.made, checkpoint=str(error))
    trainer.world.wait()


def resume(trainer: Trainer) -> None:
    """Take up the newest whole checkpoint, if there is any, and write down what is trained now.

    All is checked before anything is written; of a run that has nothing left to do nothing is.
    The first process reads, and the others get from it what they need: a node without the folder
    takes part, too.

    Raises ValueError naming what the run was begun with and cannot go on without.
    """
    world, network = trainer.world, trainer.network
    about = _about(trainer) if world.first else {}
    state = _take_up(trainer, about) if world.first else None
    rest = None if state is None else {**state.rest, "optimizer": None, "update": state.update}
    rest = world.share(rest)
    if rest is not None:
        trainer.update = rest["position"]
        trainer.shift = trainer.update - rest["update"]
        trainer.unreadable, trainer.settled = rest["unreadable"], rest["settled"]
        trainer.scored, trainer.scores = rest["scored"], rest["scores"]
        if trainer.settled:
            return
        state = state or State(rest["update"], {}, {}, {"optimizer": {}})
        distributed.restore_model(network, state.model, world)
        if trainer.average is not None:
            distributed.restore_model(trainer.average.module, state.average or {}, world)
        _restore_optimizer(trainer, state.rest["optimizer"])
        if rest["scaler"]:  # empty in other dtypes than fp16
            trainer.scaler.load_state_dict(rest["scaler"])
    if world.first:
        made = None if rest is None else trainer.made
        trainer.folder.root.mkdir(parents=True, exist_ok=True)
        trainer.trackers = Trackers(trainer.options.track, trainer.folder.root, made)
        trainer.folder.begin(about)
        trainer.folder.rewind(made)


def _restore_optimizer(trainer: Trainer, moments: dict[str, Any]) -> None:
    """The moments from the checkpoint; betas, eps and weight decay are the recipe's of today."""
    groups = trainer.optimizer.param_groups
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    distributed.restore_optimizer(trainer.network, trainer.optimizer, moments, trainer.world)
    for group, own in zip(trainer.optimizer.param_groups, settings, strict=True):
        group.update(own)


def _take_up(trainer: Trainer, about: dict[str, Any]) -> State | None:
    """The newest whole checkpoint, and what the log says of it; None where none is.

    Raises ValueError where it does not fit `about`.
    """
    folder, say = trainer.folder, trainer.watch.say
    path = folder.newest(say)
    if path is None and not folder.holds_something():
        return None
    found = resuming.changes(folder.about(), about)
    facts = [change for change in found if change.name in resuming.FACTS]
    resuming.check([c for c in found if c not in facts], folder.root, say)
    if path is None:
        resuming.check(facts, folder.root, say)
        say("no checkpoint is whole: beginning again")
        return None
    state = load_state(path)
    if trainer.average is not None and state.average is None:
        raise ValueError(f"ema: {path} has no averaged weights; expected --ema None")
    kept = state.rest.pop("plan", None) or _plan_of(folder.about(), about, state.update)
    position = resuming.position(kept, trainer.plan)
    if position > trainer.total:
        raise ValueError(
            f"epochs: expected at least {position / trainer.plan.updates:g}, which the run in "
            f"{folder.root} has made; got {trainer.recipe.epochs}"
        )
    scored, scores = 0, {}
    for entry in folder.entries(state.update):
        if "model" in entry:
            scored = entry["update"]
            scores = {name: entry[name] for name in ("model", "average") if name in entry}
    settled = position == trainer.total and scored == state.update and _is_finished(trainer)
    if settled:
        for change in facts:
            say(f"{change.name} changed since: {change.now} now; it was {change.before}")
        say(f"the run in {folder.root} is finished; nothing is left to do, it stays as it was")
    else:
        resuming.check(facts, folder.root, say)
        say(f"going on after update {state.update} ({path})")
    state.rest |= {"scored": scored, "scores": scores, "position": position, "settled": settled}
    return state


def _plan_of(before: dict[str, Any], about: dict[str, Any], update: int) -> dict[str, int]:
    """The plan of a checkpoint that an older version wrote without one."""
    recipe = before["options"].get("recipe", {})
    batch = int(recipe.get("batch_size", about["options"]["recipe"]["batch_size"]))
    return resuming.place(Plan(about["images"], batch), update)


def _is_finished(trainer: Trainer) -> bool:
    names = ["model"] if trainer.average is None else ["model", "average"]
    return all((trainer.folder.root / f"{name}.safetensors").is_file() for name in names)


def finish(trainer: Trainer) -> None:
    """The final weights under their own names, model and average."""
    models = {"model": (trainer.network, distributed.plain(trainer.network))}
    if trainer.average is not None:
        models["average"] = (trainer.average.module, trainer.average.module)
    for name, (network, model) in models.items():
        state = distributed.model_state(network)  # a collective: every process takes part
        if not trainer.world.first:
            continue
        path = trainer.folder.root / f"{name}.safetensors"
        if isinstance(model, DeiT):
            checkpoint.save_state(state, model.config, path)
        else:
            write_tensors(state, path)
    trainer.watch.say(f"final weights in {trainer.folder.root / 'model.safetensors'}")
    trainer.world.wait()
