"""Configurations measured on this machine (`deit tune`): where they are kept, when they are used.

A file a GPU model, <cache>/fused-deit/<device name>.json, cache being XDG_CACHE_HOME or ~/.cache.
An entry belongs to the versions of torch, Triton, driver and kernel sources that it was measured
with; with others it is ignored and the pinned default of `triton.configs` runs. A process reads
the files once, when a kernel is first launched. FUSED_DEIT_TUNED=0 ignores them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch

SCHEMA = 1
KEPT = 4  # sets of versions a file holds: the newest
PINNED = "pinned default, never timed on a GPU"

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

    def __post_init__(self) -> None:
        """Raises TypeError for what an edited file may hold."""
        numbers = isinstance(self.microseconds, (int, float)) and isinstance(self.candidates, int)
        if not numbers or not isinstance(self.date, str):
            raise TypeError(f"expected microseconds, candidates and a date; got {self}")


@dataclass(frozen=True)
class Table:
    """What holds for one architecture on this machine, or why nothing does."""

    device: str = ""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    ignored: str = ""


def folder() -> Path:
    """Where the files are; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fused-deit"


def path(device: str) -> Path:
    """The file of a GPU model."""
    return folder() / (re.sub(r"[^\w.-]+", "_", device) + ".json")


@functools.cache
def versions() -> dict[str, str]:
    """What a measurement depends on beside the GPU."""
    return {
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "driver": _driver(),
        "kernels": _sources_hash(),
    }


def _driver() -> str:
    """The kernel module's version; CUDA's as the driver states it where /proc has none."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[0]
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value}" if version.value else "none"


def _sources_hash() -> str:
    total = hashlib.sha256()
    for source in sorted((Path(__file__).parent / "triton").glob("*.py")):
        total.update(f"{source.name}\0".encode() + source.read_bytes())
    return total.hexdigest()[:16]


def store(device: str, entries: Mapping[str, Entry]) -> Path:
    """Add entries, of the versions that run now, to a GPU model's file; returns its path.

    Concurrent processes wait for one another (a lock beside the file), and a reader sees the old
    file or the new one, whole: it is put in place by a rename. A file that is not ours or is
    broken is kept as <name>.unreadable.
    """
    target = path(device)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            sets = _read(target)
        except ValueError:
            target.replace(target.with_suffix(".unreadable"))
            sets = []
        except FileNotFoundError:
            sets = []
        mine = next((s for s in sets if s["versions"] == versions()), None)
        rest = [s for s in sets if s is not mine]
        merged = {**(mine or {}).get("entries", {})}
        merged |= {name: dataclasses.asdict(entry) for name, entry in entries.items()}
        newest = {"versions": versions(), "entries": dict(sorted(merged.items()))}
        document = {"schema": SCHEMA, "device": device, "sets": [newest, *rest][:KEPT]}
        _write(target, json.dumps(document, indent=1) + "\n")
    return target


def _write(target: Path, text: str) -> None:
    """Replace a file by one that is on the disk in full before it has the name."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename, too
    finally:
        os.close(directory)


def _read(file: Path) -> list[dict[str, Any]]:
    """The file's sets. Raises ValueError for what is not such a file, FileNotFoundError."""
    document = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{file.name}: expected a tuning file of schema {SCHEMA}")
    sets = document.get("sets")
    if not isinstance(sets, list) or not all(
        isinstance(s, dict) and isinstance(s.get("entries"), dict) and "versions" in s for s in sets
    ):
        raise ValueError(f"{file.name}: expected `sets`, each with `versions` and `entries`")
    return sets


def load(device: str) -> Table:
    """The entries for a GPU model that belong to the versions that run now.

    Warns of a file that is there and cannot be read: its user believes that it is used.
    """
    try:
        sets = _read(path(device))
        for one in sets:
            if one["versions"] == versions():
                return Table(device, {name: Entry(**e) for name, e in one["entries"].items()})
    except FileNotFoundError:
        return Table(device)
    except (OSError, ValueError, TypeError) as error:
        ignored = f"{path(device)} cannot be read: {error}"
        warnings.warn(f"deit.kernels: {ignored}; the pinned defaults run", stacklevel=2)
        return Table(device, ignored=ignored)
    if not sets:
        return Table(device)
    other = [
        f"{name} {sets[0]['versions'].get(name)}, now {now}"
        for name, now in versions().items()
        if sets[0]["versions"].get(name) != now
    ]
    return Table(device, ignored="tuned with other versions: " + "; ".join(other))


@functools.cache
def tables() -> dict[int, Table]:
    """By architecture (a key of configs.SHARED_MEMORY), for the GPUs of this machine."""
    off = os.environ.get("FUSED_DEIT_TUNED") == "0" or os.environ.get("TRITON_INTERPRET") == "1"
    if off or not any(folder().glob("*.json")) or not torch.cuda.is_available():
        return {}
    from deit.kernels.triton import configs

    models: dict[int, set[str]] = {}
    for index in range(torch.cuda.device_count()):
        arch = configs.family(*torch.cuda.get_device_capability(index))
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

    def __init__(self, factory: Callable[P, R], kind: type) -> None:
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
            from deit.kernels.triton import candidates

            why_not = "; ".join(candidates.illegal(self.__name__, config, arguments))
        if why_not or (config is None and pinned is not None and entry.config is not None):
            return pinned, f"{PINNED} (the tuned one is illegal: {why_not or entry.config})"
        return config, (
            f"tuned {entry.date[:10]} on {table.device}: {entry.microseconds:.1f} us, the best of "
            f"{entry.candidates}"
        )

    __name__: str


# Factory name -> the factory; filled by `tunable`.
TUNABLE: dict[str, Tunable[..., Any]] = {}


def tunable(kind: type) -> Callable[[Callable[P, R]], Tunable[P, R]]:
    """Lets `deit tune` choose for a factory of `kind`."""
    return lambda factory: Tunable(factory, kind)


def revive(kind: type, fields: Mapping[str, Any] | None) -> Any:
    """The configuration that was stored; None for none, and for fields that are not `kind`'s."""
    if fields is None or set(fields) != {f.name for f in dataclasses.fields(kind)}:
        return None
    # The dataclasses hold ints and bools, and JSON keeps the two apart.
    sound = all(type(fields[f.name]).__name__ == f.type for f in dataclasses.fields(kind))
    return kind(**fields) if sound else None


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def reasons() -> Iterator[str]:
    """Why tuned configurations of this machine are not used, a sentence each."""
    for table in tables().values():
        if table.ignored:
            yield table.ignored
