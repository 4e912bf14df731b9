"""When `fuse` measures, what, and what it keeps: behind its `measure`, `example` and `budget`.

The calls that the fused model makes are found without its weights (calls.py). Those that nothing
speaks for are measured in a process of their own (`deit.kernels.measure`), then the model itself is
raced against what it was (whole_models.py). Many processes of a run agree (ranks.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deit.fused_vit import calls, ranks, records, whole_models
from deit.fused_vit.modules import Fused
from deit.fused_vit.racing import said
from deit.fused_vit.requests import BUDGETS, VARIABLE, Request, device_of, obstacle
from deit.fused_vit.whole_models import Outcome
from deit.kernels import measure as operators
from deit.kernels.engine import device_key, dispatch, verdicts
from deit.kernels.engine.problems import Problem

BATCHES = {"cuda": 64, "cpu": 8}  # images, beside one
FOR_OPERATORS = 0.7  # of the budget; the race gets what is left
PATIENCE = 120.0  # seconds beyond the budget that other processes wait for the one that measures


@dataclass
class Measured:
    """What stands after fusing: the calls found, the races, and sentences for the report."""

    device: torch.device | None = None
    problems: list[Problem] = field(default_factory=list)
    outcomes: list[tuple[nn.Module, Outcome]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def settle(
    model: nn.Module, impls: dict[str, str], own: dict[str, str] | None, asked: Request
) -> Measured:
    """Measure what the fused `model` calls and nothing speaks for, and race it; as asked.

    impls: operator -> implementation that the model was fused with; own: those of its own dtype,
    where it was fused with 8 bits.
    """
    found = Measured()
    if "auto" not in impls.values() or not _any_fused(model):
        return found
    device, why_not = device_of(model), obstacle()
    if asked.how == "never":
        if ranks.many() and not why_not and isinstance(device, torch.device):
            _as_one(device, found.notes)
        return found
    if isinstance(device, str):
        why_not = why_not or device
    elif device.type not in BUDGETS:
        why_not = why_not or f"its parameters are on {device}"
    if why_not or not isinstance(device, torch.device):
        found.notes.append(f"not measured: {why_not}")
        return found
    found.device = device
    plan = _Plan(model, impls, own, asked, device, found.notes)
    found.problems = plan.problems
    if (why_not := ranks.unmet()) != "":
        verdicts.use([], alone=True)
        whole_models.use({}, alone=True)
        found.notes.append(f"not measured: {why_not}")
        return found
    if not plan.problems:
        return found
    outcomes = _together(plan, found.notes) if ranks.many() else plan.run()
    found.outcomes = [(c.network, outcomes[c.name]) for c in plan.races if c.name in outcomes]
    if left := operators.missing(plan.problems, device):
        found.notes.append(
            f"not measured yet: {len(left)} kinds of calls; the next fuse goes on with them, and a "
            "larger budget= does so at once"
        )
    return found


def _any_fused(model: nn.Module) -> bool:
    return any(isinstance(module, Fused) for module in model.modules())


@dataclass(frozen=True)
class _Course:
    """A network to be raced: on what, and what its outcome is kept under."""

    network: nn.Module
    shape: Sequence[int]
    dtype: torch.dtype
    training: bool
    name: str


class _Plan:
    """The calls of a fused model, and its networks to be raced."""

    def __init__(
        self,
        model: nn.Module,
        impls: dict[str, str],
        own: dict[str, str] | None,
        asked: Request,
        device: torch.device,
        notes: list[str],
    ) -> None:
        self.own, self.asked, self.device = own, asked, device
        self.end = time.perf_counter() + asked.seconds(device)  # finding the calls counts, too
        self.problems: list[Problem] = []
        self.races: list[_Course] = []
        self.title = whole_models.kind_of(model)
        example = asked.example
        if example is not None:
            subjects: Any = [(model, tuple(example.shape[1:]), example.dtype)]
        else:
            subjects = [(network, shape, next(network.parameters()).dtype)
                        for network, shape in calls.networks(model)
                        if _any_fused(network)]  # fmt: skip
        if not subjects:
            notes.append("not measured: its images' size is not known: give example=images")
        batch = BATCHES[device.type] if example is None else len(example)
        for network, shape, dtype in subjects:
            training = network.training and torch.is_grad_enabled() and any(
                p.requires_grad for p in network.parameters()
            )  # fmt: skip
            full = (batch, *shape)
            try:
                problems = list(self._calls(network, full, dtype, training))
            except calls.Unknown as error:
                notes.append(
                    f"not measured: {type(network).__name__} on {list(full)}: {error}"
                    + ("; give example=images" if example is None else "")
                )
                continue
            self.problems += [each for each in problems if each not in self.problems]
            name = whole_models.name_of(network, full, dtype, problems, impls, training=training)
            if asked.race:
                self.races.append(_Course(network, full, dtype, training, name))

    def _calls(
        self, network: nn.Module, shape: Sequence[int], dtype: torch.dtype, training: bool
    ) -> Iterator[Problem]:
        # The batch that is raced first: it is what a small budget should be spent on.
        for batch in dict.fromkeys((shape[0], 1)):
            given = (batch, *shape[1:])
            if training:
                yield from calls.calls_of(network, given, dtype, training=True)
            yield from calls.calls_of(network, given, dtype, training=False)
            if self.own is not None and batch == shape[0]:  # which are raced
                yield from calls.calls_of(network, given, dtype, training=False, impls=self.own)

    def lacking(self) -> list[Problem]:
        """The calls to be measured now."""
        if self.asked.how == "now":
            return self.problems
        return operators.missing(self.problems, self.device)

    def run(self) -> dict[str, Outcome]:
        """Measure what is lacking, and race what was not raced; the outcomes by their names."""
        lacking, seconds = self.lacking(), self.asked.seconds(self.device)
        with Speaker() as say:
            if lacking:
                key = device_key.device_key(self.device)
                say(
                    f"measuring {len(lacking)} calls of {self.title} on {key}, at most "
                    f"{seconds:.0f} s ({VARIABLE}=never: not at all)"
                )
                left = self.left() - (1 - FOR_OPERATORS) * seconds
                if left > 0:
                    operators.measure(lacking, self.device, budget=left, report=say.now)
            known, chosen = whole_models.known(self.device), self._chosen()
            found = {}
            for course in self.races:
                kept = f"{course.name}, {chosen}"
                outcome = None if self.asked.how == "now" else known.get(kept)
                if (outcome is None or outcome.lapsed) and self._ready(say):
                    outcome = self._race(course, kept, say) or outcome
                if outcome is not None:
                    found[course.name] = outcome
        return found

    def _chosen(self) -> str:
        """The hash of what runs each call: a race of other choices says nothing of these."""
        chosen = [dispatch.basis_of(each, self.device).candidates for each in self.problems]
        return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:8]

    def _ready(self, say: Speaker) -> bool:
        """Whether a race would tell: asked for, or all calls known and some measured here."""
        if self.asked.how == "now":
            return True
        if operators.missing(self.problems, self.device):
            say(f"{self.title} is raced once all its calls are measured; fuse goes on with them")
            return False
        return self._measured_here()

    def _measured_here(self) -> bool:
        """Whether the calls run by what was measured here, and not by what is shipped alone."""
        return any(
            dispatch.basis_of(problem, self.device).evidence == verdicts.HERE
            for problem in self.problems
        )

    def left(self) -> float:
        """Seconds of the budget."""
        return self.end - time.perf_counter()

    def _race(self, course: _Course, kept: str, say: Speaker) -> Outcome | None:
        kind = whole_models.kind_of(course.network)
        say.now(f"racing {course.name.rpartition(',')[0]} against what it was")
        for batch in dict.fromkeys((course.shape[0], 1)):
            try:
                found = whole_models.race(
                    course.network,
                    self.own,
                    (batch, *course.shape[1:]),
                    course.dtype,
                    training=course.training,
                    budget=self.left(),
                )
            except Exception as error:  # whatever a model may raise; memory, too
                say(f"{kind} was not raced: {said(error)}")
                return None
            if found is not None:
                whole_models.store(self.device, kept, found)
                return found
        say(f"{kind} was not raced: of the budget, {max(0.0, self.left()):.1f} s are left")
        return None


def _together(plan: _Plan, notes: list[str]) -> dict[str, Outcome]:
    """What one process of the group measured, in force in all of them and alone."""
    key = device_key.device_key(plan.device)
    asked: dict[str, Any] = {
        "device": str(key),
        "versions": device_key.versions(key.kind),
        "problems": [problem.plain() for problem in plan.problems],
        "races": [course.name for course in plan.races],
    }
    if plan.asked.how == "now":
        asked["again"] = _again(asked)
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def make() -> dict[str, Any]:
        outcomes = {name: each.plain() for name, each in plan.run().items()}
        return {"outcomes": outcomes} | records.record(plan.device)

    made = _taken(name, make, plan.asked.seconds(plan.device), notes)
    return records.revived(made.get("outcomes", {}), "another process")


def _as_one(device: torch.device, notes: list[str]) -> None:
    """What is stored for one process of the group, in force in all of them; once."""
    key = device_key.device_key(device)
    name = f"stored {key} {device_key.versions(key.kind)}"
    if name not in _counts:
        _counts[name] = 1
        _taken(name, lambda: records.record(device), 0.0, notes)


def _taken(
    name: str, make: Callable[[], dict[str, Any]], seconds: float, notes: list[str]
) -> dict[str, Any]:
    """What one process of the group made: in force in all of them, and alone."""
    try:
        made = ranks.shared(name, make, seconds + PATIENCE)
    except ranks.Missing as error:
        message = f"the process of this group that measures gave nothing: {error}"
        warnings.warn(f"fuse: {message}", stacklevel=6)
        notes.append(f"not measured: {message}")
        made = {"verdicts": [], "networks": {}}
    records.adopt(made, "another process")
    return made


_counts: dict[str, int] = {}


def _again(asked: dict[str, Any]) -> int:
    """How many times this process has asked for the same anew."""
    key = json.dumps(asked, sort_keys=True)
    _counts[key] = _counts.get(key, 0) + 1
    return _counts[key]


class Speaker:
    """Says what is being measured: on a terminal on one line that goes, else through logging.

    Called, it is a sentence worth keeping in a log; `now` is what is being done.
    """

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty() if sys.stderr is not None else False
        self.log = logging.getLogger("deit.fused_vit")
        self.shown = False

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __call__(self, line: str) -> None:
        self.log.info("fuse: %s", line)
        self._show(line + "\n")

    def now(self, line: str) -> None:
        """What is being done, until the next."""
        self.log.debug("fuse: %s", line)
        self._show(line)

    def _show(self, line: str) -> None:
        if self.terminal:
            self.shown = True
            sys.stderr.write(f"\r\x1b[Kfuse: {line}")
            sys.stderr.flush()
