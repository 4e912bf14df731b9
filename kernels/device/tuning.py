"""Configurations measured on this machine (`deit tune`): where they are kept, when they are used.

A file a GPU model, <cache>/fused-deit/<device name>.json, cache being XDG_CACHE_HOME or ~/.cache.
An entry belongs to the versions of torch, Triton, driver and kernel sources that it was measured
with; with others it is ignored and the pinned default of the operator's tiles.py runs. A process
reads the files once, when a kernel is first launched. FUSED_DEIT_TUNED=0 ignores them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
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

from deit.kernels.device import chips
from deit.kernels.device.tiles import Configuration
from deit.kernels.engine import json_files
from deit.kernels.engine.json_files import Fields

SCHEMA = 1
KEPT = 4  # sets of versions a file holds: the newest
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
class Set:
    """What was measured with the same versions of everything."""

    versions: dict[str, str]
    entries: dict[str, Entry]


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
    folder = Path(__file__).parents[1]
    for source in sorted(
        {*folder.glob("*/triton*.py"), *folder.glob("*/tiles.py"), *folder.glob("device/*.py")}
    ):
        name = source.relative_to(folder).as_posix()
        total.update(f"{name}\0".encode() + source.read_bytes())
    return total.hexdigest()[:16]


def store(device: str, entries: Mapping[str, Entry]) -> Path:
    """Add entries, of the versions that run now, to a GPU model's file; returns its path.

    Concurrent processes wait for one another (a lock beside the file), and a reader sees the old
    file or the new one, whole: it is put in place by a rename. A file that is not ours or is
    broken is kept as <name>.unreadable. Raises OSError, such as for a lock that is a symbolic link
    or another user's.
    """
    target = path(device)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        try:
            sets = _read(target, device)
        except FileNotFoundError:
            sets = []
        except (ValueError, OSError):
            target.replace(target.with_suffix(".unreadable"))
            sets = []
        mine = next((one.entries for one in sets if one.versions == versions()), {})
        newest = Set(versions(), dict(sorted({**mine, **entries}.items())))
        rest = [one for one in sets if one.versions != versions()]
        kept = [dataclasses.asdict(one) for one in [newest, *rest][:KEPT]]
        document = {"schema": SCHEMA, "device": device, "sets": kept}
        _write(target, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return target


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock on `file`. It is made where it is missing, and never written to.

    In a folder that others may write, the file could be a link to any file of this user's, or its
    owner could keep the lock for ever. Both are refused (OSError).
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(file, flags, 0o600)
    try:
        try:
            json_files.check_kind(descriptor, file, own=True)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error), str(file)) from None
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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


def _read(file: Path, device: str) -> list[Set]:
    """The file's sets. Raises ValueError for what is not such a file, OSError for another's."""
    found = Fields(json_files.read(file, own=True), file.name)
    found.choice("schema", (SCHEMA,))
    found.choice("device", (device,))
    sets = []
    for number, one in enumerate(found.array("sets", dict, "objects")):
        one = Fields(one, file.name, f"sets[{number}]")
        names = one.fields("versions")
        entries = one.fields("entries")
        sets.append(
            Set(
                {name: names.text(name) for name in names.values},
                {name: _entry(entries.fields(name)) for name in entries.values},
            )
        )
    return sets


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
        sets = _read(path(device), device)
    except FileNotFoundError:
        return Table(device)
    except (OSError, ValueError) as error:
        ignored = f"{path(device)} cannot be read: {error}"
        warnings.warn(f"deit.kernels: {ignored}; the pinned defaults run", stacklevel=2)
        return Table(device, ignored=ignored)
    for one in sets:
        if one.versions == versions():
            return Table(device, one.entries)
    if not sets:
        return Table(device)
    other = [
        f"{name} {sets[0].versions.get(name)}, now {now}"
        for name, now in versions().items()
        if sets[0].versions.get(name) != now
    ]
    return Table(device, ignored="tuned with other versions: " + "; ".join(other))


@functools.cache
def tables() -> dict[int, Table]:
    """By architecture (a key of chips.CHIPS), for the GPUs of this machine."""
    off = os.environ.get("FUSED_DEIT_TUNED") == "0" or os.environ.get("TRITON_INTERPRET") == "1"
    if off or not any(folder().glob("*.json")) or not torch.cuda.is_available():
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


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def reasons() -> Iterator[str]:
    """Why tuned configurations of this machine are not used, a sentence each."""
    for table in tables().values():
        if table.ignored:
            yield table.ignored
