"""A fused network raced against what it was, and what came of it: kept beside the verdicts.

<cache>/fused-deit/networks-<device key>.json, an entry a network, mode and shape of images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deit.fused_vit import calls, racing, swapping
from deit.fused_vit.modules import Fused
from deit.fused_vit.racing import Lap
from deit.kernels.engine import autocast, cache_files, device_key, verdicts
from deit.kernels.engine.cache_files import File
from deit.kernels.engine.json_files import Fields
from deit.kernels.engine.problems import Problem, dtype_name

SCHEMA = 1
WAS, FUSED, OWN = "as it was", "fused", "fused in its own dtype"
LONGEST = 1e9  # milliseconds that a call may have taken
MOST = 1e9  # of a ratio


@dataclass(frozen=True)
class Outcome:
    """What a race found of one network.

    network: its class and what it ran. laps: it as it was, fused and, where it was fused with
    8 bits, fused in its own dtype. own: the fused one against the latter.
    """

    network: str
    laps: tuple[Lap, ...]
    date: str
    device: str
    versions: dict[str, str]
    own: Lap | None = None

    @property
    def fused(self) -> Lap:
        """The fused one, against what the network was."""
        return next(lap for lap in self.laps if lap.name == FUSED)

    @property
    def kept(self) -> bool:
        """Whether the network is faster fused."""
        return not self.fused.refused and self.fused.verdict == "faster"

    @property
    def lapsed(self) -> bool:
        """Whether it was left undecided, and too long ago to stand; never in a run's folder."""
        lap = self.fused
        undecided = not (lap.refused or _alone) and verdicts.noisy(lap.low, lap.high)
        return undecided and verdicts.lapsed(self.date)

    def __str__(self) -> str:
        lap, was = self.fused, self.laps[0]
        if lap.refused:
            return f"{self.network}: fused it is refused: {lap.refused}"
        return (
            f"{self.network}: {was.milliseconds:.4g} ms {was.name}, {lap.milliseconds:.4g} ms "
            f"fused, {lap.words()}, measured here {self.date[:10]}"
        )

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def revive(cls, found: Fields) -> Outcome:
        """From JSON. Raises ValueError for what is none."""
        found.only([field.name for field in dataclasses.fields(cls)])
        laps = tuple(
            _lap(Fields(lap, found.file, f"{found.path}.laps[{number}]"))
            for number, lap in enumerate(found.array("laps", dict, "laps"))
        )
        if len(laps) < 2 or FUSED not in [lap.name for lap in laps]:
            raise found.wrong("laps", f"two and more, one of them {FUSED!r}", len(laps))
        versions = found.fields("versions")
        return cls(
            found.text("network")[:300],
            laps,
            found.text("date")[:40],
            found.text("device")[:300],
            {name: versions.text(name) for name in versions.values},
            found.optional("own", lambda name: _lap(found.fields(name))),
        )


def _lap(found: Fields) -> Lap:
    found.only([field.name for field in dataclasses.fields(Lap)])
    return Lap(
        found.text("name")[:100],
        found.number("milliseconds", 0, LONGEST),
        found.number("speed", 0, MOST),
        found.number("low", 0, MOST),
        found.number("high", 0, MOST),
        found.number("apart", 0, MOST),
        found.text("refused")[:500],
    )


def name_of(
    network: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype,
    problems: Iterable[Problem],
    impls: dict[str, str],
    *,
    training: bool,
) -> str:
    """What an outcome is kept under: the network's class, mode and images, and of all that decides
    its speed, calls, modules, implementations asked for and compilation, the hash."""
    kinds = [type(m).__name__ for m in network.modules()]
    sizes = [str(tuple(p.shape)) for p in network.parameters()]
    facts = [[p.plain() for p in problems], kinds, sizes, sorted(impls.items()), _compiled(network)]
    hashed = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{words(network, shape, dtype, training=training)}, {hashed}"


def words(network: nn.Module, shape: Sequence[int], dtype: torch.dtype, *, training: bool) -> str:
    """ "DeiT, inference, 8 x 3 x 224 x 224 float32"."""
    mode = "training" if training else "inference"
    return f"{kind_of(network)}, {mode}, {' x '.join(map(str, shape))} {dtype_name(dtype)}"


def kind_of(network: nn.Module) -> str:
    """The name of a network's class, of the original's where it is fused."""
    kind = type(network)
    return (swapping.without(kind, Fused) if issubclass(kind, Fused) else kind).__name__


def _compiled(network: nn.Module) -> bool:
    return getattr(network, "_compiled_call_impl", None) is not None


# ---- what is known

_given: dict[tuple[str, str], Outcome] = {}  # (device key, name)
_alone = False


def use(outcomes: dict[str, Outcome], *, alone: bool = False) -> None:
    """Put outcomes by their names in force in this process, above the files, or `alone`.

    One of another device is never met; one with other versions is not used.
    """
    global _alone
    if alone:
        _given.clear()
        _alone = True
    _given.update({(each.device, name): each for name, each in outcomes.items()})


def forget() -> None:
    """Drop what `use` was given; for tests."""
    global _alone
    _given.clear()
    _alone = False


@contextlib.contextmanager
def scoped() -> Iterator[None]:
    """What `use` is given within is in force until the end; then what was before is again."""
    global _alone
    before, was_alone = dict(_given), _alone
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)
        _alone = was_alone


def known(device: torch.device) -> dict[str, Outcome]:
    """The outcomes on a device that stand in this process."""
    key = device_key.device_key(device)
    found: dict[str, Outcome] = {}
    file = _file(device)
    if not _alone and file.path.exists():
        try:
            found = file.load()[0]
        except (OSError, ValueError) as error:
            warnings.warn(
                f"fuse: {file.path} cannot be read: {error}; it is not used", stacklevel=2
            )
    given = {name: each for (place, name), each in _given.items() if place == str(key)}
    return found | {n: each for n, each in given.items() if each.versions == file.versions}


def store(device: torch.device, name: str, outcome: Outcome) -> None:
    """Keep an outcome for later processes, and put it in force in this one.

    Where it cannot be kept, a warning names the path.
    """
    use({name: outcome})
    file = _file(device)
    try:
        file.store({name: outcome})
    except OSError as error:
        warnings.warn(
            f"fuse: {file.path} cannot be written ({error}): what was measured holds in this "
            "process and is measured again by the next",
            stacklevel=2,
        )


def _file(device: torch.device) -> File[Outcome]:
    key = device_key.device_key(device)
    path = cache_files.folder() / f"networks-{cache_files.file_name(str(key))}.json"
    versions = device_key.versions(key.kind)
    return File(path, str(key), SCHEMA, versions, Outcome.revive, Outcome.plain)


# ---- the race


def race(
    network: nn.Module,
    own: dict[str, str] | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    training: bool,
    budget: float,
) -> Outcome | None:
    """Time a fused network against itself unfused; None where the budget is too small for it.

    own: where it was fused with 8 bits, the implementations of its own dtype's operators, which
    then run, too. Twins without hooks run, over the same parameters; buffers are copies. In
    training a step is forward and backward, and no `.grad` is touched.

    Raises:
        What the unfused network raises.
    """
    device = next(p.device for p in network.parameters())
    fused = calls.stripped(network, _shared).train(training)
    ways = {WAS: swapping.twin_of(fused, Fused, {}, fused=False), FUSED: fused}
    if own is not None:
        ways[OWN] = swapping.twin_of(fused, Fused, {}, fused=True)
        for module in ways[OWN].modules():
            if isinstance(module, Fused):
                module.adopt(own)
    if _compiled(network):
        ways = {name: torch.compile(twin) for name, twin in ways.items()}
    steps: dict[str, Callable[[Tensor], Any]] = dict(ways)
    if training:
        parameters = [p for p in fused.parameters() if p.requires_grad]
        steps = {name: _step(twin, parameters) for name, twin in ways.items()}

    def images() -> Tensor:
        return torch.randn(tuple(shape), device=device).to(dtype)

    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(training),
        calls.same_generators(device),
    ):
        found = racing.run(
            steps,
            images,
            device,
            images=shape[0],
            budget=budget,
            dtype=coarsest(network, dtype, eight_bits=own is not None),
        )
    if found is None:
        return None
    key = device_key.device_key(device)
    rival = found.lap(OWN) if own is not None else None
    beside = rival is not None and not (rival.refused or found.lap(FUSED).refused)
    return Outcome(
        words(network, shape, dtype, training=training),
        found.laps,
        cache_files.now(),
        str(key),
        device_key.versions(key.kind),
        found.against(FUSED, OWN) if beside else None,
    )


def _shared(value: Tensor) -> Tensor:
    """A parameter over the same memory, with no hook and no `.grad`; a copy of another tensor."""
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach(), value.requires_grad)
    return value.detach().clone()


def _step(network: Any, parameters: list[nn.Parameter]) -> Callable[[Tensor], Any]:
    def step(images: Tensor) -> Any:
        torch.manual_seed(0)  # stochastic depth leaves out the same branches in all
        out = network(images)
        tensors = [t for t in racing.tensors(out) if t.requires_grad]
        loss = sum(t.float().square().mean() for t in tensors)
        if isinstance(loss, Tensor) and parameters:
            torch.autograd.grad(loss, parameters, allow_unused=True)
        return [t.detach() for t in tensors]

    return step


def coarsest(network: nn.Module, dtype: torch.dtype, *, eight_bits: bool = False) -> torch.dtype:
    """The dtype with the fewest bits that a network computes in, by its weights, input, autocast.

    For 8 bits bf16 stands, which has as many.
    """
    if eight_bits:
        return torch.bfloat16
    weight = next(network.parameters())
    under = autocast.dtype_of(weight)
    found = [p.dtype for p in network.parameters() if p.is_floating_point()]
    known = [each for each in (dtype, under, *found) if each in racing.APART]
    return max(known, key=racing.APART.__getitem__, default=torch.float32)
