"""What a run may change when it is given again, by the rules in its settings' lines."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deit.data.sampling import Plan
from deit.data.sources import Source
from deit.settings import Rule, lines
from deit.training.options import Options

RULES: dict[str, Rule] = {
    f"{group}.{line.name}".lstrip("."): line.metadata["rule"] for group, line, _ in lines(Options)
}

# Of the data itself, which an unchanged `data` may no longer hold. A run that has nothing left to
# do is not refused for them: it stays as it is.
FACTS: dict[str, Rule] = {
    "classes": "refused",
    "mean": "refused",
    "std": "refused",
    "images": "refused",
    "held_out_images": "said",
    "images_digest": "said",
}


@dataclass(frozen=True)
class Change:
    """An option or a fact that is not what it was."""

    name: str
    rule: Rule
    before: Any
    now: Any

    def __str__(self) -> str:
        name = self.name.rpartition(".")[2]
        if name == "images_digest":
            return "going on with other images or labels than there were, as many as it was before"
        return f"going on with {name} {_shown(self.now)}; it was {_shown(self.before)}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two `run.json`; what an older version did not keep does not.

    Raises ValueError for one that is no run's.
    """
    was = before.get("options")
    if not isinstance(was, dict):
        raise ValueError(f"run.json: options: expected an object; got {was!r:.60}")
    found = []
    for name, value in _flat(now["options"]):
        group, _, last = name.rpartition(".")
        inside = was.get(group, {}) if group else was
        if not isinstance(inside, dict):
            raise ValueError(f"run.json: options.{group}: expected an object; got {inside!r:.60}")
        if last in inside and inside[last] != value:
            rule = RULES[name]
            if name == "recipe.ema" and None in (inside[last], value):
                rule = "refused"  # an average is neither begun nor given up
            found.append(Change(name, rule, inside[last], value))
    facts = [n for n in FACTS if n in before and before[n] != now[n]]
    return found + [Change(n, FACTS[n], before[n], now[n]) for n in facts]


def check(found: list[Change], root: os.PathLike[str], say: Callable[[str], None]) -> None:
    """Raises ValueError for the first change that is refused; says those that are to be said."""
    for change in found:
        if change.rule == "refused":
            name = change.name.rpartition(".")[2]
            raise ValueError(
                f"out: {root} holds a run with {name} {_shown(change.before)}; got "
                f"{_shown(change.now)}. Another run may start from its weights (--weights)"
            )
    for change in found:
        if change.rule == "said":
            say(str(change))


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    """A value, or of a long list its length and ends."""
    if not isinstance(value, list):
        return str(value)
    named = [str(v) for v in value]
    if len(named) > 6:
        named = [f"{len(named)}:", *named[:3], "...", *named[-2:]]
    return ", ".join(named).replace(":,", ":")


def digest(source: Source) -> str:
    """Of the names and labels of a source's images, in order."""
    found = hashlib.sha256(np.ascontiguousarray(source.labels, dtype=np.int64).tobytes())
    for index in range(len(source)):
        found.update(os.fsencode(source.name(index)) + b"\0")
    return found.hexdigest()


# ---- where an epoch goes on


def place(plan: Plan, position: int) -> dict[str, int]:
    """What a checkpoint keeps of its plan: the updates it counts, and the samples of each."""
    return {"position": position, "updates": plan.updates, "samples": plan.size * plan.pieces}


def position(kept: Mapping[str, int], plan: Plan) -> int:
    """The update of `plan` at which as much of an epoch is done as where `kept` was written.

    A part of an update is done again rather than left out.
    """
    epoch, within = divmod(kept["position"], kept["updates"])
    done = within * kept["samples"] // (plan.size * plan.pieces)
    return epoch * plan.updates + min(done, plan.updates)
