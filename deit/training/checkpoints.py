"""What a run keeps and goes on from: its description, its checkpoints, its final weights."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from deit.data.sampling import Plan
from deit.data.sources import Source
from deit.model import DeiT
from deit.training import resume
from deit.training.learner import Learner
from deit.training.options import Options
from deit.training.runs import RunFolder, State, load_state
from deit.weights import checkpoint
from deit.weights.files import write_tensors


def about(options: Options, source: Source, held_out: Source, learner: Learner) -> dict[str, Any]:
    """What `run.json` says, as it reads it again."""
    model = learner.model
    # Whoever reads a checkpoint's weights needs what no shape shows: heads, epsilon.
    shape = {"config": asdict(model.config)} if isinstance(model, DeiT) else {}
    found = {
        "network": {"arch": options.arch, "img_size": options.img_size, **shape},
        "classes": source.classes,
        "mean": source.mean,
        "std": source.std,
        "images": len(source),
        "images_digest": resume.digest(source),
        "held_out_images": len(held_out),
        "options": asdict(options),
        "parameters": learner.parameters,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    return json.loads(json.dumps(found, default=str))


@dataclass(frozen=True)
class Progress:
    """How far a run had come where its checkpoint was written."""

    update: int  # in the plan of today
    made: int  # updates in all
    unreadable: dict[str, str]
    scored: int  # updates that were made at the last evaluation
    scores: dict[str, Any]
    settled: bool  # nothing is left to do


class Checkpoints:
    """Writes a learner into a run's folder, and takes it up from there.

    The first process reads and writes, and the others get from it what they need: a node without
    the folder takes part, too. So every process has to call each method.
    """

    def __init__(self, folder: RunFolder, learner: Learner, say: Callable[[str], None]) -> None:
        self.folder, self.learner, self.say = folder, learner, say
        self.world = learner.world

    def save(self, made: int, unreadable: dict[str, str], place: dict[str, int]) -> None:
        """Write a checkpoint. `place`: of `resume.place`. Raises OSError (a full disk, say)."""
        weights = self.learner.weights()
        rest = {**self.learner.moments(), "unreadable": unreadable, "plan": place}
        if self.world.first:
            self.folder.save(State(made, weights["model"], weights.get("average"), rest))

    def take_up(self, about: dict[str, Any], plan: Plan, total: int) -> Progress | None:
        """Fill the learner from the newest whole checkpoint; None where there is none.

        Nothing is written. A run that has nothing left to do is settled, and its learner not
        filled. `about` counts in the first process alone; `total`: the updates of `plan`.

        Raises ValueError naming what the run was begun with and cannot go on without.
        """
        weights: dict[str, Any] = {}
        found = self._newest(about, plan, total) if self.world.first else None
        state, progress = found or (None, None)
        scaler = None if state is None else state.rest["scaler"]
        progress, scaler = self.world.share((progress, scaler))
        if progress is None or progress.settled:
            return progress
        moments = {"scaler": scaler}
        if state is not None:
            weights = {"model": state.model, "average": state.average}
            moments["optimizer"] = state.rest["optimizer"]
        self.learner.restore(weights, moments)
        return progress

    def _newest(
        self, about: dict[str, Any], plan: Plan, total: int
    ) -> tuple[State, Progress] | None:
        """The newest whole checkpoint, and what it and the log say of it."""
        folder, say = self.folder, self.say
        path = folder.newest(say)
        if path is None and not folder.holds_something():
            return None
        found = resume.changes(folder.about(), about)
        facts = [change for change in found if change.name in resume.FACTS]
        resume.check([c for c in found if c not in facts], folder.root, say)
        if path is None:
            resume.check(facts, folder.root, say)
            say("no checkpoint is whole: beginning again")
            return None
        state = load_state(path)
        if self.learner.average is not None and state.average is None:
            raise ValueError(f"ema: {path} has no averaged weights; expected --ema None")
        kept = state.rest.get("plan") or _plan_of(folder.about(), about, state.update)
        position = resume.position(kept, plan)
        if position > total:
            raise ValueError(
                f"epochs: expected at least {position / plan.updates:g}, which the run in "
                f"{folder.root} has made; got {about['options']['recipe']['epochs']}"
            )
        scored = 0
        scores: dict[str, Any] = {}
        for entry in folder.entries(state.update):
            if "model" in entry:
                scored = entry["update"]
                scores = {name: entry[name] for name in ("model", "average") if name in entry}
        settled = position == total and scored == state.update and self._is_finished()
        if settled:
            for change in facts:
                say(f"{change.name} changed since: {change.now} now; it was {change.before}")
            say(f"the run in {folder.root} is finished; nothing is left to do, it stays as it was")
        else:
            resume.check(facts, folder.root, say)
            say(f"going on after update {state.update} ({path})")
        unreadable = state.rest["unreadable"]
        return state, Progress(position, state.update, unreadable, scored, scores, settled)

    def _is_finished(self) -> bool:
        names = self.learner.models
        return all((self.folder.root / f"{name}.safetensors").is_file() for name in names)

    def finish(self) -> None:
        """The final weights under their own names, model and average."""
        weights = self.learner.weights()
        for name, model in self.learner.models.items() if self.world.first else ():
            path = self.folder.root / f"{name}.safetensors"
            if isinstance(model, DeiT):
                checkpoint.save_state(weights[name], model.config, path)
            else:
                write_tensors(weights[name], path)
        self.say(f"final weights in {self.folder.root / 'model.safetensors'}")
        self.world.wait()


def _plan_of(before: dict[str, Any], about: dict[str, Any], update: int) -> dict[str, int]:
    """The plan of a checkpoint that an older version wrote without one."""
    recipe = before["options"].get("recipe", {})
    batch = int(recipe.get("batch_size", about["options"]["recipe"]["batch_size"]))
    return resume.place(Plan(about["images"], batch), update)
