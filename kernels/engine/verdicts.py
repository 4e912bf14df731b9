"""What was measured on a device, and what "auto" runs by it.

A verdict speaks for a class of calls on one device with one set of versions. They are kept in the
user's cache, a file a device: <cache>/fused-deit/verdicts-<device key>.json. Above the files stand
those that a process was given (`use`), below them what is shipped (`deit.kernels.engine.measured`).
A process reads a device's file once, when an operator is first called there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deit.kernels.engine import cache_files, device_key, measured
from deit.kernels.engine.cache_files import File
from deit.kernels.engine.device_key import DeviceKey
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.engine.problems import ShapeClass, Sizes
from deit.kernels.engine.verdict import MARGIN as MARGIN
from deit.kernels.engine.verdict import Refused as Refused
from deit.kernels.engine.verdict import Rival as Rival
from deit.kernels.engine.verdict import Timed as Timed
from deit.kernels.engine.verdict import Verdict as Verdict
from deit.kernels.engine.verdict import lapsed as lapsed
from deit.kernels.engine.verdict import noisy as noisy
from deit.kernels.engine.verdict import revive_all as revive_all

SCHEMA = 1
PREFIX = "verdicts-"
NEAR = 1  # powers of two of rows or tokens within which a class counts as measured
COMMAND = "fuse(model, measure='now') or `deit tune`"

NOT_MEASURED, HERE = "not measured", "measured here"


# ---- the files


def is_file(path: Path) -> bool:
    """Whether a file of the cache is one of verdicts, by its name."""
    return path.name.startswith(PREFIX)


def path(key: DeviceKey) -> Path:
    """A device's file; it need not exist."""
    return cache_files.folder() / f"{PREFIX}{cache_files.file_name(str(key))}.json"


def _file(key: DeviceKey) -> File[Verdict]:
    versions = device_key.versions(key.kind)
    return File(path(key), str(key), SCHEMA, versions, Verdict.revive, Verdict.plain)


def store(key: DeviceKey, found: Iterable[Verdict]) -> Path | None:
    """Keep verdicts for later processes, and put them in force in this one.

    Where they cannot be kept (a read-only home, a full disk, a cache that is a file), a warning
    names the path, and they are in force in this process alone. Returns the path, or None.
    """
    found = list(found)
    use(found)
    try:
        return _file(key).store({str(one.shape_class): one for one in found})
    except OSError as error:
        warnings.warn(
            f"deit.kernels: {path(key)} cannot be written ({error}): what was measured holds in "
            "this process and is measured again by the next",
            stacklevel=2,
        )
        return None


def stored(key: DeviceKey) -> tuple[list[Verdict], str]:
    """A device's verdicts from its file, and why there are none ("" where nothing was stored).

    Warns of a file that is there and cannot be read: its user believes that it is used.
    """
    if os.name != "posix" or not path(key).exists():  # no hash of sources for nothing
        return [], ""
    try:
        entries, why_none = _file(key).load()
    except (OSError, ValueError) as error:
        why_none = f"{path(key)} cannot be read: {error}"
        warnings.warn(f"deit.kernels: {why_none}; it is not used", stacklevel=2)
        return [], why_none
    return list(entries.values()), f"measured with {why_none}" if why_none else ""


# ---- what is in force

_given: list[Verdict] = []  # by `use`; the later ones count
_alone = False


def use(verdicts: Iterable[Verdict], *, alone: bool = False) -> list[str]:
    """Put verdicts in force in this process, above the files.

    alone: in place of what was put in force before, and of the files: what is shipped alone stands
        below them. A resumed run computes so what it computed before, whatever was measured since.

    Returns a sentence for each verdict of another device or other versions; those are not used.
    """
    global _alone
    if alone:
        _given.clear()
        _alone = True
    why_not = []
    for one in verdicts:
        key = _key_of(one)
        if one.problem.operator not in OPERATORS:
            why_not.append(f"{one.problem}: an operator that is not known here")
        elif key is None:
            why_not.append(f"{one.shape_class}: measured on {one.device}, which is not here")
        elif dict(one.versions) != device_key.versions(key.kind):
            why_not.append(f"{one.shape_class}: measured with other versions")
        else:
            _given.append(one)
    _forget_tables()
    return why_not


def _key_of(verdict: Verdict) -> DeviceKey | None:
    for device in devices():
        key = device_key.device_key(device)
        if str(key) == verdict.device:
            return key
    return None


def devices() -> list[torch.device]:
    """The devices of this machine that have keys, the CPU first."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found


def in_force(device: torch.device | None = None) -> list[Verdict]:
    """The verdicts that calls of this process can meet, but for those that are shipped; None: on
    the CPU and, where this process has begun to use GPUs, on those."""
    places = [device] if device is not None else devices()
    if device is None and not torch.cuda.is_initialized():
        places = places[:1]
    return [
        one
        for place in places
        for of_sizes in table_of(place).here.values()
        for each in of_sizes.values()
        for one in each
    ]


@contextlib.contextmanager
def scoped() -> Iterator[None]:
    """What `use` is given within is in force until the end; then what was before is again."""
    global _alone
    before, was_alone = list(_given), _alone
    try:
        yield
    finally:
        _given[:], _alone = before, was_alone
        _forget_tables()


def forget() -> None:
    """Drop what `use` was given, and read the files again; for tests."""
    global _alone
    _given.clear()
    _alone = False
    device_key.forget()
    _forget_tables()


_caches: list[Any] = []  # of what follows from what is in force


def _forget_tables() -> None:
    for cached in _caches:
        cached.cache_clear()


def known(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cached while what is known of the devices stays the same, by PyTorch's threads too, which
    are part of a CPU's key; a constant to torch.compile, as `constant_when_traced`'s."""

    @functools.cache
    def cached(_: int, *arguments: Any) -> Any:
        return function(*arguments)

    threads = torch.get_num_threads

    def constant(*arguments: Any) -> Any:
        return cached(threads(), *arguments)

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _caches.append(cached)
    return functools.update_wrapper(constant, function)


# (operator, training, dtype) -> sizes -> verdicts
Rows = dict[tuple[str, bool, torch.dtype], dict[Sizes, list[Verdict]]]


def _rows(verdicts: Iterable[Verdict]) -> Rows:
    """The latest of each class, of the operators that this process knows."""
    latest = {one.shape_class: one for one in verdicts if one.problem.operator in OPERATORS}
    found: Rows = {}
    for shape, one in latest.items():
        group = found.setdefault((shape.operator, shape.training, shape.dtype), {})
        group.setdefault(shape.sizes, []).append(one)
    return found


@dataclass(frozen=True)
class Table:
    """All that is known of one device: measured here, shipped verdicts, the shipped table.

    ignored: why what was stored is not used.
    """

    key: DeviceKey
    here: Rows
    shipped: Rows
    prior: measured.Prior | None
    ignored: str

    @property
    def label(self) -> str:
        """What is shipped for it, in words."""
        return self.prior.label if self.prior is not None else ""

    def ships(self, operator: str) -> bool:
        """Whether what is shipped for it says anything of an operator."""
        if self.prior is None or operator in self.prior.unmeasured:
            return False
        entries = (one for of_sizes in self.shipped.values() for each in of_sizes.values()
                   for one in each)  # fmt: skip
        return self.prior.file is None or any(one.problem.operator == operator for one in entries)


@known
def table_of(device: torch.device) -> Table:
    """What is known of a device, with the threads that PyTorch uses now."""
    key = device_key.device_key(device)
    given = [one for one in _given if one.device == str(key)]
    entries, ignored = ([], "") if _alone or device.type not in ("cpu", "cuda") else stored(key)
    prior = measured.prior(key)
    shipped = [] if prior is None else revive_all(*measured.shipped(prior))
    return Table(key, _rows([*entries, *given]), _rows(shipped), prior, ignored)


@dataclass(frozen=True)
class Basis:
    """What "auto" tries for a class of calls, and on what evidence.

    candidates: implementations, the fastest first; none: PyTorch's operators. evidence: HERE,
    "shipped for ...", or NOT_MEASURED with why. verdict: the measurement, where it is one.
    """

    candidates: tuple[str, ...]
    evidence: str
    verdict: Verdict | None = None

    @property
    def known(self) -> bool:
        """Whether anything speaks for the class."""
        return not self.evidence.startswith(NOT_MEASURED)

    def __str__(self) -> str:
        if self.verdict is None:
            return self.evidence
        one = self.verdict
        speed = f"{one.ratio:.2f} times PyTorch's speed, " if one.winner != "reference" else ""
        return f"{self.evidence} {one.date[:10]}: {speed}at {one.problem}"


def lookup(table: Table, shape: ShapeClass, *, largest: bool = False) -> Basis:
    """What stands for a class of calls on a device.

    largest: take the largest measured number of rows, where a traced call leaves rows open.
    """
    group = (shape.operator, shape.training, shape.dtype)
    shipped = f"shipped for {table.label}"
    for rows, evidence in ((table.here, HERE), (table.shipped, shipped)):
        found = rows.get(group, {}).get(shape.sizes, [])
        if found:
            if largest:
                best = max(found, key=lambda one: (one.shape_class.rows, one.date))
            else:
                best = min(found, key=lambda one: _nearest(one.shape_class, shape))
            return Basis(best.order, evidence, best)
    if table.prior is None:
        return Basis((), NOT_MEASURED + (f" ({table.ignored})" if table.ignored else ""))
    candidates, why_not = table.prior.of(shape)
    return Basis(candidates, shipped if not why_not else f"{NOT_MEASURED}: {why_not}")


def measured_of(table: Table, operator: str) -> list[tuple[str, Verdict]]:
    """Every verdict that calls of an operator can meet, with its evidence."""
    shipped = f"shipped for {table.label}"
    here = {
        one.shape_class.family: HERE for group in table.here.values() for each in group.values()
        for one in each
    }  # fmt: skip
    found = []
    for rows, evidence in ((table.here, HERE), (table.shipped, shipped)):
        for group, of_sizes in rows.items():
            for one in itertools.chain(*of_sizes.values()) if group[0] == operator else ():
                if evidence == HERE or one.shape_class.family not in here:
                    found.append((evidence, one))
    return found


def _nearest(measured_at: ShapeClass, asked: ShapeClass) -> tuple[float, int, int]:
    """The nearest first; of two as near, the larger."""
    return (
        measured_at.distance(asked.rows, asked.tokens),
        -measured_at.rows,
        -(measured_at.tokens or 0),
    )


def speaks(table: Table, shape: ShapeClass) -> bool:
    """Whether something known stands for a class, measured at about as many rows and tokens.

    What was left undecided here lapses, but not what a run or another process has given.
    """
    basis = lookup(table, shape)
    if basis.verdict is None:
        return basis.known
    here = basis.evidence == HERE and not _alone
    if here and basis.verdict.undecided and lapsed(basis.verdict.date):
        return False
    at = basis.verdict.shape_class
    return max(abs(at.rows - shape.rows), abs((at.tokens or 0) - (shape.tokens or 0))) <= NEAR


# ---- for dispatch: as little as a call can be asked


Order = Callable[[Verdict], tuple[str, ...]]


def all_ahead(verdict: Verdict) -> tuple[str, ...]:
    """The implementations to try by a verdict."""
    return verdict.order


def ahead(verdict: Verdict) -> tuple[str, ...]:
    """The same, where the winner is faster than the operator's rival, too."""
    return verdict.order if verdict.rival is None or verdict.rival.wins else ()


def of_any(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    order: Order = all_ahead,
) -> tuple[str, ...] | None:
    """The implementations to try, where the sizes do not matter; None where they do.

    Warns where nothing at all is known of the device.
    """
    table = table_of(device)
    if table.prior is None and not table.here and device.type in ("cpu", "cuda"):
        measured.warn_unmeasured(str(table.key), COMMAND)
    prior, group = table.prior, (operator, training, dtype)
    found = {() if prior is None else prior.of_any(operator, training, dtype)}
    for rows in (table.here, table.shipped):
        found |= {order(one) for one in itertools.chain(*rows.get(group, {}).values())}
    return found.pop() if len(found) == 1 else None


@known
def any_of(operator: str, device: torch.device) -> tuple[str, ...]:
    """Those that are ahead in inference at some sizes, those of the most measurements first."""
    table = table_of(device)
    counts: dict[str, int] = {}
    for _, one in measured_of(table, operator):
        for name in ahead(one)[:1] if not one.problem.training else ():
            counts[name] = counts.get(name, 0) + 1
    found = tuple(sorted(counts, key=lambda name: -counts[name]))
    return found or (table.prior.of_any(operator, False) if table.prior is not None else ())


def of_sizes(
    operator: str, device: torch.device, dtype: torch.dtype, training: bool, sizes: Sizes
) -> tuple[str, ...] | None:
    """As `of_any` for given sizes; None where rows or tokens decide."""
    table, group = table_of(device), (operator, training, dtype)
    found = table.here.get(group, {}).get(sizes) or table.shipped.get(group, {}).get(sizes)
    if found:
        orders = {one.order for one in found}
        return orders.pop() if len(orders) == 1 else None
    return () if table.prior is None else table.prior.of_any(operator, training, dtype)


def of_rows(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    sizes: Sizes,
    rows: int | None,
    tokens: int | None,
    order: Order = all_ahead,
) -> tuple[str, ...]:
    """The same for given sizes and buckets; rows is None where a trace leaves them open."""
    shape = ShapeClass(operator, training, dtype, sizes, rows or 0, tokens)
    basis = lookup(table_of(device), shape, largest=rows is None)
    return basis.candidates if basis.verdict is None else order(basis.verdict)
