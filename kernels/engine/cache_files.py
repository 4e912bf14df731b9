"""Files of measurements in the user's cache: <cache>/fused-deit/, cache being XDG_CACHE_HOME or
~/.cache.

A file holds sets of entries, and a set belongs to the versions of everything that it was measured
with. Under other versions it is ignored and kept: the newest sets stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

from deit.kernels.engine import json_files
from deit.kernels.engine.json_files import Fields

KEPT = 4  # sets of versions a file holds: the newest
LONGEST_NAME = 120  # characters of a file's name, of which a file system takes 255

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Set(Generic[Entry]):
    """What was measured with the same versions of everything."""

    versions: dict[str, str]
    entries: dict[str, Entry]


@dataclass(frozen=True)
class File(Generic[Entry]):
    """One device's file.

    path: where it is or will be. device: whose measurements it holds. schema: of its entries.
    versions: those that run now. revive: an entry from its fields; raises ValueError for what is
    none. plain: an entry as JSON.
    """

    path: Path
    device: str
    schema: int
    versions: Mapping[str, str]
    revive: Callable[[Fields], Entry]
    plain: Callable[[Entry], Any] = dataclasses.asdict  # type: ignore[assignment]

    def store(self, entries: Mapping[str, Entry]) -> Path:
        """Add entries, of the versions that run now; returns the path.

        Concurrent processes wait for one another (a lock beside the file), and a reader sees the
        old file or the new one, whole: it is put in place by a rename. A file that is not ours or
        is broken is kept as <name>.unreadable. Raises OSError, such as for a lock that is a
        symbolic link or another user's.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            try:
                sets = self.read()
            except FileNotFoundError:
                sets = []
            except (ValueError, OSError):
                self.path.replace(self.path.with_suffix(".unreadable"))
                sets = []
            now = dict(self.versions)
            mine = next((one.entries for one in sets if one.versions == now), {})
            newest = Set(now, dict(sorted({**mine, **entries}.items())))
            rest = [one for one in sets if one.versions != now]
            kept = [
                {
                    "versions": one.versions,
                    "entries": {name: self.plain(entry) for name, entry in one.entries.items()},
                }
                for one in [newest, *rest][:KEPT]
            ]
            document = {"schema": self.schema, "device": self.device, "sets": kept}
            _write(self.path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        return self.path

    def read(self) -> list[Set[Entry]]:
        """The file's sets. Raises ValueError for what is not such a file, OSError for another's."""
        found = Fields(json_files.read(self.path, own=True), self.path.name)
        found.choice("schema", (self.schema,))
        found.choice("device", (self.device,))
        sets = []
        for number, one in enumerate(found.array("sets", dict, "objects")):
            one = Fields(one, self.path.name, f"sets[{number}]")
            names = one.fields("versions")
            entries = one.fields("entries")
            sets.append(
                Set(
                    {name: names.text(name) for name in names.values},
                    {name: self.revive(entries.fields(name)) for name in entries.values},
                )
            )
        return sets

    def load(self) -> tuple[dict[str, Entry], str]:
        """The entries of the versions that run now, and why there are none: "" where nothing was
        stored, else a sentence. Raises ValueError and OSError for what cannot be read."""
        try:
            sets = self.read()
        except FileNotFoundError:
            return {}, ""
        for one in sets:
            if one.versions == self.versions:
                return one.entries, ""
        if not sets:
            return {}, ""
        other = [
            f"{name} {sets[0].versions.get(name)}, now {now}"
            for name, now in self.versions.items()
            if sets[0].versions.get(name) != now
        ]
        return {}, "other versions: " + "; ".join(other)


def folder() -> Path:
    """Where the files are; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fused-deit"


def file_name(device: str) -> str:
    """A device's name as that of a file."""
    name = re.sub(r"[^\w.-]+", "_", device)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(device.encode()).hexdigest()[:8]}"


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock on `file`. It is made where it is missing, and never written to.

    In a folder that others may write, the file could be a link to any file of this user's, or its
    owner could keep the lock for ever. Both are refused (OSError).
    """
    import fcntl  # POSIX has it

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
