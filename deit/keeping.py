"""What a run keeps: its description, its checkpoints, its final weights."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from deit import beside, checkpoint, scale
from deit.kernels.json_files import Fields
from deit.model import DeiT
from deit.runs import State, load_state, write_tensors

if TYPE_CHECKING:
    from deit.train import Trainer

# What a run may not change when it is continued.
FIXED = ("data", "arch", "shape", "distilled", "img_size", "seed", "limit_train")


def describe(trainer: Trainer) -> None:
    """Write `run.json`; refuse to go on with another network or other data.

    Raises ValueError naming what differs. Another recipe, such as more epochs, is said and taken.
    """
    about = json.loads(json.dumps(_about(trainer), default=str))
    path = trainer.folder.root / "run.json"
    if path.exists():
        before = Fields(beside.read_run(trainer.folder.root), str(path)).fields("options").values
        now = about["options"]
        for name in FIXED:
            if before[name] != now[name]:
                raise ValueError(
                    f"out: {trainer.folder.root} holds a run with {name} {before[name]}; "
                    f"got {now[name]}"
                )
        for name, value in now["recipe"].items():
            if before["recipe"].get(name) != value:
                trainer.watch.say(
                    f"going on with {name} {value}; it was {before['recipe'].get(name)}"
                )
    trainer.folder.begin(about)


def _about(trainer: Trainer) -> dict[str, Any]:
    model = scale.plain(trainer.network)
    # Whoever reads a checkpoint's weights needs what no shape shows: heads, epsilon.
    shape = {"config": asdict(model.config)} if isinstance(model, DeiT) else {}
    return {
        "network": {"arch": trainer.options.arch, "img_size": trainer.options.img_size, **shape},
        "classes": trainer.source.classes,
        "mean": trainer.source.mean,
        "std": trainer.source.std,
        "options": asdict(trainer.options),
        "parameters": trainer.size,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def save(trainer: Trainer) -> None:
    """Write a checkpoint; on a full disk say so and go on, unless this was the last chance."""
    model, average = scale.model_state(trainer.network), None
    if trainer.average is not None:
        average = scale.model_state(trainer.average.module)
    rest = {
        "optimizer": scale.optimizer_state(trainer.network, trainer.optimizer),
        "scaler": trainer.scaler.state_dict(),
        "unreadable": trainer.unreadable,
    }
    if trainer.world.first:
        try:
            trainer.folder.save(State(trainer.update, model, average, rest))
        except OSError as error:
            if trainer.stopping:
                raise
            trainer.watch.say(f"no checkpoint after update {trainer.update}: {error}")
            trainer.log(update=trainer.update, checkpoint=str(error))
    trainer.world.wait()


def resume(trainer: Trainer) -> None:
    """Take up the newest whole checkpoint, if there is any.

    The first process reads, and the others get from it what they need: a node without the folder
    takes part, too.
    """
    world, network = trainer.world, trainer.network
    state = _read_newest(trainer) if world.first else None
    rest = None if state is None else {**state.rest, "optimizer": None, "update": state.update}
    rest = world.share(rest)
    if rest is None:
        return
    state = state or State(rest["update"], {}, {}, {"optimizer": {}})
    scale.restore_model(network, state.model, world)
    if trainer.average is not None:
        scale.restore_model(trainer.average.module, state.average or {}, world)
    scale.restore_optimizer(network, trainer.optimizer, state.rest["optimizer"], world)
    trainer.scaler.load_state_dict(rest["scaler"])
    trainer.update, trainer.unreadable = rest["update"], rest["unreadable"]
    trainer.scored, trainer.scores = rest["scored"], rest["scores"]


def _read_newest(trainer: Trainer) -> State | None:
    """The newest whole checkpoint, and what the log says of it; what comes after is dropped."""
    path = trainer.folder.newest(trainer.watch.say)
    if path is None:
        return None
    state = load_state(path)
    if trainer.average is not None and state.average is None:
        raise ValueError(f"ema: {path} has no averaged weights; expected --ema None")
    trainer.folder.rewind(state.update)
    scored, scores = 0, {}
    for entry in trainer.folder.entries():
        if "model" in entry:
            scored = entry["update"]
            scores = {name: entry[name] for name in ("model", "average") if name in entry}
    state.rest |= {"scored": scored, "scores": scores}
    trainer.watch.say(f"going on after update {state.update} ({path})")
    return state


def finish(trainer: Trainer) -> None:
    """The final weights under their own names, model and average."""
    models = {"model": (trainer.network, scale.plain(trainer.network))}
    if trainer.average is not None:
        models["average"] = (trainer.average.module, trainer.average.module)
    for name, (network, model) in models.items():
        state = scale.model_state(network)  # a collective: every process takes part
        if not trainer.world.first:
            continue
        path = trainer.folder.root / f"{name}.safetensors"
        if isinstance(model, DeiT):
            checkpoint.save_state(state, model.config, path)
        else:
            write_tensors(state, path)
    trainer.watch.say(f"final weights in {trainer.folder.root / 'model.safetensors'}")
    trainer.world.wait()
