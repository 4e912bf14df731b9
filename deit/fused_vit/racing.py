"""One network run several ways, timed against each other: checked, interleaved, paired."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deit.kernels.engine.verdicts import MARGIN
from deit.kernels.prove.timing import interleave, paired

# After these rounds it is asked whether all is decided. Each look has its share of the 5 %.
LOOKS = (8, 16, 32)
CONFIDENCE = 1 - 0.05 / len(LOOKS)
SAMPLE = 0.01  # seconds that a sample takes at least, in as many calls as that needs
# How far an output may lie from the baseline's, of the largest number in it. These are nets to
# catch a broken kernel: operators are held to fp64 one by one. DeiT-B is off by 3e-6 and 0.01.
APART = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


@dataclass(frozen=True)
class Lap:
    """One way to run the network.

    milliseconds: the median of a call. speed: how many times as fast as the baseline, the median of
    the rounds' ratios; low, high: where that lies with a confidence of 95 %. apart: how far its
    output is from the baseline's, of the largest number there. refused: why it was not timed.
    """

    name: str
    milliseconds: float = 0.0
    speed: float = 1.0
    low: float = 1.0
    high: float = 1.0
    apart: float = 0.0
    refused: str = ""

    @property
    def verdict(self) -> str:
        """Against the baseline: "faster", "slower" or "no difference", by the margin."""
        if self.refused:
            return "refused"
        if self.low > 1 / (1 - MARGIN):
            return "faster"
        return "slower" if self.high < 1 - MARGIN else "no difference"

    def words(self) -> str:
        """ "1.31 (1.28 to 1.35) times as fast"."""
        return f"{self.speed:.2f} ({self.low:.2f} to {self.high:.2f}) times as fast"


@dataclass(frozen=True)
class Race:
    """Several ways to run one network, the baseline first."""

    laps: tuple[Lap, ...]
    images: int  # in a batch
    rounds: int = 0
    samples: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict, repr=False)

    def lap(self, name: str) -> Lap:
        """The one called `name`."""
        return next(each for each in self.laps if each.name == name)

    def against(self, name: str, other: str) -> Lap:
        """`name`'s lap with `other` for its baseline."""
        return _lap(name, self.samples[name], self.samples[other])

    def best(self) -> str:
        """The fastest: one later in order takes the place of one before where it beats that."""
        found = self.laps[0].name
        for each in self.laps[1:]:
            if not each.refused and self.against(each.name, found).verdict == "faster":
                found = each.name
        return found

    def __str__(self) -> str:
        first = self.laps[0]
        names = max(len(each.name) for each in self.laps)
        lines = [f"{'':{names}}  ms a call  images/s  against {first.name}, 95 % interval"]
        for each in self.laps:
            if each.refused:
                lines.append(f"{each.name:{names}}  refused: {each.refused}")
                continue
            cells = f"{each.milliseconds:9.2f}  {1e3 * self.images / each.milliseconds:8.1f}"
            said = "" if each is first else f"  {each.words()}, {each.verdict}"
            lines.append(f"{each.name:{names}}  {cells}{said}")
        return "\n".join(lines)


def run(
    ways: Mapping[str, Callable[[Any], Any]],
    inputs: Callable[[], Any],
    device: torch.device,
    *,
    images: int,
    budget: float,
    dtype: torch.dtype,
) -> Race | None:
    """Race `ways` of running one network; None where the budget holds too few rounds.

    Each is called once on the same input and its output held against the first's. Those that
    raise or differ are refused. The others are timed in rounds of fresh input, in an order that
    turns about, until every one is decided or the budget is spent.

    Args:
        ways: name -> what takes an input and runs; the first is the baseline.
        inputs: makes an input of the same kind with other numbers, apart from timing.
        images: in an input. budget: seconds. dtype: the coarsest one of the arithmetic.

    Raises:
        What the baseline raises.
    """
    if budget <= 0:
        return None
    end = time.perf_counter() + budget
    given, refused = inputs(), dict[str, str]()
    seconds: dict[str, float] = {}
    apart: dict[str, float] = {}
    want: Any = None
    for name, way in ways.items():
        try:
            got = way(given)
            apart[name] = 0.0 if want is None else _apart(got, want)
            if not apart[name] <= APART.get(dtype, 0.2):
                raise ValueError(f"its output is {apart[name]:.1g} of the largest number off")
            seconds[name] = _timed(way, given, device, 1)
            if time.perf_counter() + LOOKS[0] * sum(seconds.values()) > end:
                return None
        except Exception as error:  # whatever a compiler or kernel may raise
            if want is None:
                raise
            refused[name] = said(error)
        want = got if want is None else want
    del want, got
    round_takes = sum(max(each, SAMPLE) for each in seconds.values())
    if time.perf_counter() + LOOKS[0] * round_takes > end:
        return None
    calls = {name: max(1, math.ceil(SAMPLE / max(each, 1e-6))) for name, each in seconds.items()}
    samples: dict[str, list[float]] = {name: [] for name in seconds}

    def fresh(_: int) -> None:
        nonlocal given
        given = inputs()

    def step(name: str) -> Callable[[int], float]:
        def one(_: int) -> float:
            samples[name].append(_timed(ways[name], given, device, calls[name]))
            return samples[name][-1]

        return one

    def enough(rounds: int) -> bool:
        late = rounds >= LOOKS[0] and time.perf_counter() + round_takes > end
        return late or (rounds in LOOKS and _decided(samples))

    interleave([step(name) for name in samples], LOOKS[-1], before=fresh, enough=enough)
    base = samples[next(iter(ways))]
    laps = [
        Lap(name, refused=refused[name])
        if name in refused
        else dataclasses.replace(_lap(name, samples[name], base), apart=apart[name])
        for name in ways
    ]
    return Race(tuple(laps), images, len(base), samples)


def said(error: Exception) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _lap(name: str, mine: Sequence[float], theirs: Sequence[float]) -> Lap:
    found = paired(mine, theirs, CONFIDENCE)
    assert found is not None  # LOOKS[0] rounds are enough
    return Lap(name, 1e3 * statistics.median(mine), found.ratio, found.low, found.high)


def _decided(samples: Mapping[str, Sequence[float]]) -> bool:
    """Whether each is known to be faster than the first, or known not to be."""
    first, *others = samples.values()
    found = [paired(each, first, CONFIDENCE) for each in others]
    return all(one is not None and one.decided(MARGIN) for one in found)


def _timed(way: Callable[[Any], Any], given: Any, device: torch.device, calls: int) -> float:
    """Seconds a call, until the device has done it."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        way(given)
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _apart(got: Any, want: Any) -> float:
    """The largest difference between two outputs' tensors, of the largest number in them."""
    pairs = zip(tensors(got), tensors(want), strict=True)
    found = [_difference(a, b) for a, b in pairs if b.is_floating_point()]
    return max(found, default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"its output is {list(a.shape)}, the baseline's {list(b.shape)}")
    if not b.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    largest = float(b.abs().max())
    return float((a - b).abs().max()) / largest if largest else float(a.abs().max())


def tensors(value: Any) -> list[Tensor]:
    """A call's output tensors, in order; of a Hugging Face output its fields'."""
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]
