"""Measures operators on this machine: every candidate checked, then timed, in another process.

`measure` gives verdicts for problems, keeps them in the user's cache and puts them in force;
`missing` says which problems nothing speaks for yet.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from deit.kernels.engine import device_key, verdicts
from deit.kernels.engine.json_files import Fields
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.engine.problems import Problem, TensorSpec
from deit.kernels.engine.verdicts import Refused, Verdict

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from deit.kernels.measure.child import main; main()"
)
LOOK = 2.0  # seconds after which the parent looks whether the child goes on
STARTS = 120.0  # seconds that the child may take to start, on a busy machine
HANGS = 30.0  # seconds in one candidate without an end, at least


def missing(problems: Sequence[Problem], device: torch.device) -> list[Problem]:
    """Those for which neither a stored verdict nor what is shipped speaks, one a class."""
    table = verdicts.table_of(device)
    classes = {one.shape_class: one for one in problems}
    return [one for shape, one in classes.items() if not verdicts.speaks(table, shape)]


def measure(
    problems: Sequence[Problem],
    device: torch.device,
    *,
    budget: float,
    report: Callable[[str], object] = print,
) -> list[Verdict]:
    """Measure what runs each problem's class fastest; keeps the verdicts, returns them.

    It runs in another process with this one's threads and environment. A candidate that is wrong,
    does not compile, crashes or hangs is refused by name, and the rest goes on.

    Args:
        problems: calls, as `dispatch.recording` notes them; one a class is measured.
        device: where; one that has a key (cpu, cuda).
        budget: seconds for all of them, spent on the expensive ones first.
        report: is told what is found, a line at a time.

    Returns:
        The verdicts found: in force, and stored. Problems that there was no time for, and those
        that PyTorch's own operators cannot run, have none; `report` says so.

    Raises:
        ValueError: a budget that is no positive number, another type of device.
    """
    if (
        isinstance(budget, bool)
        or not isinstance(budget, (int, float))
        or not 0 < budget < math.inf
    ):
        raise ValueError(f"budget: expected a positive number of seconds; got {budget!r}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a CPU or a CUDA device; got {device}")
    classes = {one.shape_class: one for one in problems}
    ordered = sorted(classes.values(), key=_first)
    found: list[Verdict] = []
    try:
        for verdict in _Session(ordered, device, budget, report).verdicts():
            found.append(verdict)
            report(described(verdict))
    finally:
        if found:  # what is done is kept, whatever ended it
            verdicts.store(device_key.device_key(device), found)
    return found


def described(verdict: Verdict) -> str:
    """A verdict in a line."""
    parts = [
        f"{name} refused ({one.refused})" if isinstance(one, Refused) else
        f"{name} {one.microseconds:.0f} us" for name, one in verdict.candidates.items()
    ]  # fmt: skip
    if verdict.rival is not None:
        parts.append(f"{verdict.rival.name} {verdict.rival.microseconds:.0f} us")
    speed = f", {verdict.ratio:.2f} times PyTorch's speed" if verdict.order else ""
    return f"{verdict.problem}: {verdict.winner}{speed} ({', '.join(parts)})"


def _first(problem: Problem) -> tuple[bool, float]:
    """Operators that others are made of come first: a rival runs them by "auto"."""
    return OPERATORS[problem.operator].rival is not None, -_work(problem)


def _work(problem: Problem) -> float:
    """About the multiply-adds of a call, to share the budget by."""
    specs = [a for a in problem.arguments if isinstance(a, TensorSpec)]
    x = specs[0]
    rows = x.numel() / max(1, x.shape[-1] if x.shape else 1)
    weights = sum(
        spec.numel() for spec in specs[1:] if len(spec.shape) > 1 and spec.shape != x.shape
    )
    if problem.operator == "patch_embed":
        rows = specs[-1].shape[1] * x.shape[0]
    tokens = x.shape[1] if OPERATORS[problem.operator].by_tokens and len(x.shape) > 2 else 0
    work = rows * weights + 2.0 * x.numel() * tokens / 3 + 30.0 * x.numel()
    return work * (3 if problem.training else 1)


@dataclass
class _Session:
    """The children that measure one list of problems, one after another."""

    problems: Sequence[Problem]
    device: torch.device
    budget: float
    report: Callable[[str], object]
    refused: dict[int, dict[str, str]] = field(default_factory=dict)
    found: list[Any] = field(default_factory=list)
    ended: str = ""

    def verdicts(self) -> Iterator[Verdict]:
        """The verdicts, as they come."""
        end = time.monotonic() + self.budget
        left, late = dict(enumerate(self.problems)), 0
        while left:
            with tempfile.TemporaryFile() as mark, tempfile.TemporaryFile() as errors:
                for number, answer in self._answers(left, end, mark, errors):
                    problem = left.pop(number)
                    if "verdict" in answer:
                        self.found.append(answer["verdict"])
                        yield Verdict.revive(Fields(answer["verdict"], "the measuring process"))
                    elif answer.get("late"):
                        late += 1
                    else:
                        self.report(f"{problem}: not measured: {answer['why']}")
                if left and not self._blame(left, mark, errors):
                    break
        if late or left:
            self.report(f"no time left for {late + len(left)} of {len(self.problems)} calls")

    def _answers(
        self, left: dict[int, Problem], end: float, mark: BinaryIO, errors: BinaryIO
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """One child's answers, until it ends or hangs; `self.ended` says how."""
        plan = {
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "budget": max(1.0, end - time.monotonic()),
            "modules": sorted({OPERATORS[p.operator].public.__module__ for p in left.values()}),
            "given": [*(one.plain() for one in verdicts.in_force(self.device)), *self.found],
            "mark": mark.fileno(),
            "problems": [
                {
                    "number": number,
                    "problem": problem.plain(),
                    "weight": math.sqrt(_work(problem)),
                    "refused": self.refused.get(number, {}),
                }
                for number, problem in left.items()
            ],
        }
        command = [sys.executable, "-c", PROGRAM, json.dumps(list(map(str, sys.path)))]
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=(mark.fileno(),),
                env={**os.environ, "FUSED_DEIT_MEASURE": "never"},
            )
        except OSError as error:
            self.ended = f"cannot be started: {error}"
            return
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(plan).encode())
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            yield from self._lines(child, mark)
        finally:
            child.kill()  # nothing where it has ended
            child.wait()

    def _lines(
        self, child: subprocess.Popen[bytes], mark: BinaryIO
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        assert child.stdout is not None
        descriptor, text = child.stdout.fileno(), b""
        last, since = b"", time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while True:
                if not selector.select(LOOK):
                    now = os.pread(mark.fileno(), 256, 0)
                    limit = max(HANGS, self.budget) if now else STARTS
                    if now != last:
                        last, since = now, time.monotonic()
                    elif time.monotonic() - since > limit:
                        self.ended = f"did not come to an end in {limit:.0f} s"
                        return
                    continue
                chunk = os.read(descriptor, 1 << 16)
                if not chunk:
                    break
                since = time.monotonic()
                *lines, text = (text + chunk).split(b"\n")
                for line in lines:
                    answer = json.loads(line)
                    yield answer.pop("number"), answer
        status = child.wait()
        self.ended = f"ended with {_named(status)}"

    def _blame(self, left: dict[int, Problem], mark: BinaryIO, errors: BinaryIO) -> bool:
        """Refuse what the child was at when it ended; False where nothing can be blamed."""
        text = os.pread(mark.fileno(), 256, 0)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
        if not text:
            why = f"the measuring process {self.ended}" + (f": {said[-1][:300]}" if said else "")
            self.report(f"nothing was measured: {why}")
            return False
        number, name, _ = json.loads(text)
        if number not in left:  # it ended between two problems, and once is no reason to go on
            self.report(f"the measuring process {self.ended}")
            return False
        if name in ("", "reference"):
            problem = left.pop(number)
            self.report(f"{problem}: not measured: PyTorch's own operators: {self.ended}")
        else:
            why = f": {said[-1][:300]}" if said and "exit status" in self.ended else ""
            self.refused.setdefault(number, {})[name] = self.ended + why
        return True


def _named(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"
