"""Configurations measured on this machine (`deit tune`): where they are kept, when they are used.

A file a GPU model, <cache>/fused-deit/<device name>.json, cache being XDG_CACHE_HOME or ~/.cache.
An entry belongs to the versions of torch, Triton, driver and kernel sources that it was measured
with; with others it is ignored and the pinned default of the operator's tiles.py runs. A process
reads the files once, when a kernel is first launched. FUSED_DEIT_TUNED=0 ignores them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from deit.kernels.device import chips
from deit.kernels.device.tiles import Configuration
from deit.kernels.engine import cache_files, verdicts
from deit.kernels.engine.cache_files import File
from deit.kernels.engine.device_key import driver
from deit.kernels.engine.json_files import Fields

SCHEMA = 1
LONGEST = 1e9  # microseconds that a kernel may have taken
PINNED = "pinned default, not tuned on this GPU"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Entry:
    """One measured choice. config: the dataclass's fields, None for "no such kernel"; times are
    medians, in microseconds; candidates: how many were measured."""

    config: dict[str, int | bool] | None
    microseconds: float
    pinned_microseconds: float | None
    candidates: int
    date: str


@dataclass(frozen=True)
class Table:
    """What holds for one architecture on this machine, or why nothing does."""

    device: str = ""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    ignored: str = ""


def path(device: str) -> Path:
    """The file of a GPU model."""
    return cache_files.folder() / f"{cache_files.file_name(device)}.json"


def _file(device: str) -> File[Entry]:
    return File(path(device), device, SCHEMA, versions(), _entry)


@functools.cache
def versions() -> dict[str, str]:
    """What a measurement depends on beside the GPU."""
    return {
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "driver": driver(),
        "kernels": _sources_hash(),
    }


def _sources_hash() -> str:
    total = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for source in sorted(
        {*folder.glob("*/triton*.py"), *folder.glob("*/tiles.py"), *folder.glob("device/*.py")}
    ):
        name = source.relative_to(folder).as_posix()
        total.update(f"{name}\0".encode() + source.read_bytes())
    return total.hexdigest()[:16]


def store(device: str, entries: Mapping[str, Entry]) -> Path:
    """Add entries, of the versions that run now, to a GPU model's file; see `File.store`."""
    return _file(device).store(entries)


def _entry(found: Fields) -> Entry:
    found.only([one.name for one in dataclasses.fields(Entry)])
    return Entry(
        found.optional("config", lambda name: found.fields(name).values),
        found.number("microseconds", 0, LONGEST),
        found.optional("pinned_microseconds", found.number, 0, LONGEST),
        found.integer("candidates", 1, 1 << 20),
        found.text("date")[:40],
    )


def load(device: str) -> Table:
    """The entries for a GPU model that belong to the versions that run now.

    Warns of a file that is there and cannot be read: its user believes that it is used.
    """
    try:
        entries, why_none = _file(device).load()
    except (OSError, ValueError) as error:
        ignored = f"{path(device)} cannot be read: {error}"
        warnings.warn(f"deit.kernels: {ignored}; the pinned defaults run", stacklevel=2)
        return Table(device, ignored=ignored)
    return Table(device, entries, f"tuned with {why_none}" if why_none else "")


@functools.cache
def tables() -> dict[int, Table]:
    """By architecture (a key of chips.CHIPS), for the GPUs of this machine."""
    off = os.environ.get("FUSED_DEIT_TUNED") == "0" or os.environ.get("TRITON_INTERPRET") == "1"
    files = cache_files.folder().glob("*.json")
    if off or all(map(verdicts.is_file, files)) or not torch.cuda.is_available():
        return {}
    models: dict[int, set[str]] = {}
    for index in range(torch.cuda.device_count()):
        arch = chips.family(*torch.cuda.get_device_capability(index))
        models.setdefault(arch, set()).add(torch.cuda.get_device_name(index))
    return {arch: _one(names) for arch, names in models.items()}


def _one(names: set[str]) -> Table:
    if len(names) == 1:
        return load(next(iter(names)))
    # A configuration is chosen by architecture: two models of one would need a table each.
    return Table(ignored=f"several models of one architecture: {', '.join(sorted(names))}")


def entry_name(factory: str, arguments: Mapping[str, Any]) -> str:
    """ "linear(arch=90, dtype=bfloat16, width=768, depth=768)"."""
    shown = (f"{n}={str(v).removeprefix('torch.')}" for n, v in arguments.items())
    return f"{factory}({', '.join(shown)})"


class Tunable(Generic[P, R]):
    """A factory of configurations: the tuned one where there is a legal one, else the pinned.

    kind: the dataclass it makes. pinned: the factory itself.
    """

    def __init__(self, factory: Callable[P, R], kind: type[Configuration]) -> None:
        functools.update_wrapper(self, factory)
        self.pinned, self.kind = factory, kind
        self._signature = inspect.signature(factory)
        self._chosen = functools.cache(self._choose)
        TUNABLE[factory.__name__] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not tables():
            return self.pinned(*args, **kwargs)
        return self._chosen(args, tuple(kwargs.items()))[0]

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> tuple[R, str]:
        """The configuration, and on what evidence it was chosen."""
        return self._choose(args, tuple(kwargs.items()))

    def candidates(self, arguments: Mapping[str, Any]) -> list[Any]:
        """Legal configurations, the pinned one first, each once; None is for the other form."""
        default: Callable[..., R] = self.pinned
        found: list[Any] = [default(**arguments)]
        for config in self.kind.space(arguments, found[0]):
            if config not in found and (config is None or not config.illegal(arguments)):
                found.append(config)
        return found

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments by name, with the defaults of those left out."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _choose(self, args: Any, kwargs: Any) -> tuple[R, str]:
        arguments = self.arguments(*args, **dict(kwargs))
        default: Callable[..., R] = self.pinned
        pinned, table = default(**arguments), tables().get(arguments.get("arch", 0), Table())
        entry = table.entries.get(entry_name(self.__name__, arguments))
        if entry is None:
            return pinned, PINNED + (f" ({table.ignored})" if table.ignored else "")
        config, why_not = revive(self.kind, entry.config), ""
        if config is not None:
            why_not = "; ".join(config.illegal(arguments))
        if why_not or (config is None and pinned is not None and entry.config is not None):
            return pinned, f"{PINNED} (the tuned one is illegal: {why_not or entry.config})"
        return config, (
            f"tuned {entry.date[:10]} on {table.device}: {entry.microseconds:.1f} us, the best of "
            f"{entry.candidates}"
        )

    __name__: str


# Factory name -> the factory; filled by `tunable`.
TUNABLE: dict[str, Tunable[..., Any]] = {}


def tunable(kind: type[Configuration]) -> Callable[[Callable[P, R]], Tunable[P, R]]:
    """Lets `deit tune` choose for a factory of `kind`."""
    return lambda factory: Tunable(factory, kind)


def revive(kind: type[Configuration], fields: Mapping[str, Any] | None) -> Any:
    """The configuration that was stored; None for none, and for fields that are not `kind`'s."""
    if fields is None or set(fields) != {f.name for f in dataclasses.fields(kind)}:
        return None
    # The dataclasses hold ints and bools, and JSON keeps the two apart.
    sound = all(type(fields[f.name]).__name__ == f.type for f in dataclasses.fields(kind))
    return kind(**fields) if sound else None


def reasons() -> Iterator[str]:
    """Why tuned configurations of this machine are not used, a sentence each."""
    for table in tables().values():
        if table.ignored:
            yield table.ignored
