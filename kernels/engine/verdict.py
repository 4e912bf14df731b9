"""What one measurement found, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from deit.kernels.engine import registry
from deit.kernels.engine.json_files import Fields
from deit.kernels.engine.problems import Problem, ShapeClass

LONGEST = 1e9  # microseconds that a call may have taken
MOST = 1e9  # of a ratio


# An undecided measurement stands for so long: a job of many short processes on a busy machine
# measures once an hour, and not at every start.
AGAIN = timedelta(hours=1)
MARGIN = 0.02  # by which a candidate must be faster to displace another
NOISE = 0.1  # the width of an interval of speeds beyond which a machine was not quiet


def noisy(low: float, high: float) -> bool:
    """Whether an interval of speeds leaves open who is faster, for want of quiet and not of a
    difference: quiet ones are about 0.02 wide, beside a busy core some reach from 0.8 to 2.5."""
    return low <= 1 / (1 - MARGIN) < high and high - low > NOISE


def lapsed(date: str) -> bool:
    """Whether an undecided measurement of this date is to be made again."""
    try:
        age = datetime.now(timezone.utc) - datetime.fromisoformat(date)
    except (ValueError, TypeError):  # a date that this package did not write
        return True
    return not timedelta(0) <= age <= AGAIN


@dataclass(frozen=True)
class Timed:
    """A candidate that was right, and its time.

    microseconds: the median of a call's. ratio: of PyTorch's time to its own in the same rounds,
    the median: 2 is twice PyTorch's speed. low, high: where that lies with a confidence of 95 %.
    used: the share of the error rule that it used; None where it is what the others are held to.
    """

    microseconds: float
    ratio: float
    low: float
    high: float
    used: float | None = None


@dataclass(frozen=True)
class Refused:
    """A candidate that was wrong, did not compile or crashed, and how."""

    refused: str


@dataclass(frozen=True)
class Rival:
    """The same by other operators: a block's parts, or in 8 bits the call's own dtype.

    ratio, low, high: of its time to the winner's. wins: whether the winner is faster by the rule.
    """

    name: str
    microseconds: float
    ratio: float
    low: float
    high: float
    wins: bool


@dataclass(frozen=True)
class Verdict:
    """What one measurement found. winner: an implementation, "reference" for PyTorch's operators.

    order: the implementations that displaced PyTorch, the winner first.
    """

    problem: Problem
    winner: str
    candidates: Mapping[str, Timed | Refused]
    date: str
    device: str
    versions: Mapping[str, str]
    order: tuple[str, ...] = ()
    rival: Rival | None = None

    @property
    def shape_class(self) -> ShapeClass:
        """The calls it speaks for."""
        return self.problem.shape_class

    @property
    def ratio(self) -> float:
        """The winner's speed in PyTorch's."""
        found = self.candidates.get(self.winner)
        return found.ratio if isinstance(found, Timed) else 1.0

    @property
    def undecided(self) -> bool:
        """Whether PyTorch's operators run only because too much else ran while it was measured."""
        timed = [one for one in self.candidates.values() if isinstance(one, Timed)]
        return not self.order and any(noisy(one.low, one.high) for one in timed)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "problem": self.problem.plain(),
            "winner": self.winner,
            "order": list(self.order),
            "candidates": {name: asdict(one) for name, one in self.candidates.items()},
            "rival": None if self.rival is None else asdict(self.rival),
            "date": self.date,
            "device": self.device,
            "versions": dict(self.versions),
        }

    @classmethod
    def revive(cls, found: Fields) -> Verdict:
        """From JSON. Raises ValueError for what is none."""
        found.only(
            ("problem", "winner", "order", "candidates", "rival", "date", "device", "versions")
        )
        known = ("reference", *registry.NAMESPACES)
        order = tuple(found.array("order", str, "implementations"))
        if not set(order) <= set(known):
            raise found.wrong("order", f"some of {', '.join(known)}", list(order))
        candidates, named = found.fields("candidates"), found.fields("versions")
        return cls(
            Problem.revive(found.fields("problem")),
            found.choice("winner", known),
            {name: _candidate(candidates.fields(name)) for name in candidates.values},
            found.text("date")[:40],
            found.text("device")[:300],
            {name: named.text(name) for name in named.values},
            order,
            found.optional("rival", lambda name: _rival(found.fields(name))),
        )


def _times(found: Fields) -> tuple[float, float, float, float]:
    microseconds = found.number("microseconds", 0, LONGEST)
    return (microseconds, *(found.number(n, 0, MOST) for n in ("ratio", "low", "high")))  # type: ignore[return-value]


def _candidate(found: Fields) -> Timed | Refused:
    if "refused" in found.values:
        found.only(("refused",))
        return Refused(found.text("refused")[:500])
    found.only(("microseconds", "ratio", "low", "high", "used"))
    return Timed(*_times(found), found.optional("used", found.number, 0, MOST))


def _rival(found: Fields) -> Rival:
    found.only(("name", "microseconds", "ratio", "low", "high", "wins"))
    return Rival(found.text("name")[:100], *_times(found), found.flag("wins"))


def revive_all(values: Any, name: str) -> list[Verdict]:
    """Verdicts from a JSON array, such as a run's folder holds; `name` begins every error.

    Raises ValueError for what is none.
    """
    if not isinstance(values, list):
        raise ValueError(f"{name}: expected an array of verdicts; got {type(values).__name__}")
    return [Verdict.revive(Fields(one, name, f"[{i}]")) for i, one in enumerate(values)]
