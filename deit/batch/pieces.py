"""A folder of Parquet files that grows by whole pieces, and what was asked for beside them.

    out/_run.json                what was asked for, and once all is there what it came to
    out/piece-000000.parquet     rows 0 to 4095 of the collection, in its order
    out/.lock                    one process at a time

Piece k holds the same rows whoever makes it and when. So a run that was killed goes on by making
the pieces that are not there. A piece keeps the hash of its images' names: a collection that has
changed since is noticed and refused. Readers of Parquet pass over names that begin with _ or a dot.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from deit.batch.inputs import Item
from deit.kernels.engine import json_files
from deit.weights.files import replacing, write_atomically

ABOUT = "_run.json"
LOCK = ".lock"
_KIND = "deit pieces"
_KEY = b"deit"  # of a piece's metadata
_NAME = re.compile(r"piece-(\d{6,})\.parquet")
_PARTIAL = re.compile(r"\.(piece-\d{6,}\.parquet|_run\.json)\.\d+\.tmp")

# Folders that this process writes to: a record lock keeps out other processes alone.
_OURS: dict[str, Pieces] = {}


def require() -> None:
    """Raises ValueError where pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("Parquet needs the package pyarrow (pip install 'fused-deit[scale]')")


def digest(items: Sequence[Item]) -> str:
    """Of the names of a piece's images, in their order."""
    sums = hashlib.sha256()
    for item in items:
        sums.update(os.fsencode(item.name) + b"\0")
    return sums.hexdigest()


def _lists(values: np.ndarray, bad: np.ndarray) -> Any:
    """[n, width] as an Arrow array of lists, null where `bad`.

    Not of a fixed size, which pyarrow before 26 writes and cannot read where one is null
    (apache/arrow#35692).
    """
    import pyarrow as pa

    ends = np.cumsum(np.where(bad, 0, values.shape[1]))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values[~bad].reshape(-1)), mask=pa.array(bad))


class Pieces:
    """The output folder of one run; closed by `close`, and whenever its process ends."""

    def __init__(self, folder: str | Path, asked: Mapping[str, Any]) -> None:
        """Open a new folder, or that of an earlier run with the same `asked` (JSON).

        Raises ValueError for a folder with anything else in it, of a run that was asked for
        something else, or that another process writes to; OSError where it cannot be written.
        """
        require()
        self.folder = Path(folder)
        self.asked = json.loads(json.dumps(asked))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out: expected a folder, new or of an earlier run; {folder} is none")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_ours()
        with ExitStack() as held:
            self._claim(held)
            self._take_up()
            self._held = held.pop_all()

    def _check_ours(self) -> None:
        names = {entry.name for entry in os.scandir(self.folder)}
        strange = {name for name in names if name != LOCK and not _PARTIAL.fullmatch(name)}
        if strange and ABOUT not in names:
            raise ValueError(
                f"out: expected an empty folder or one of an earlier run; {self.folder} has "
                f"{sorted(strange)[0]} and no {ABOUT}"
            )

    def _claim(self, held: ExitStack) -> None:
        path = os.path.realpath(self.folder)
        if _OURS.setdefault(path, self) is not self:
            raise ValueError(f"out: another run of this process is writing to {self.folder}")
        held.callback(_OURS.pop, path)
        lock = open(self.folder / LOCK, "ab")  # noqa: SIM115
        held.callback(lock.close)
        # A record lock: the processes that decode are forked from this one, and would hold a
        # flock for some seconds after it was killed.
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"out: another process is writing to {self.folder}") from None

    def _take_up(self) -> None:
        self._check_ours()  # again, now that nobody else writes
        for entry in list(os.scandir(self.folder)):
            if _PARTIAL.fullmatch(entry.name):  # of a process that was killed
                os.unlink(entry.path)
        path = self.folder / ABOUT
        self.finished: dict[str, Any] | None = None
        if not path.exists():
            self._write_about(None)
        else:
            found = json_files.read(path)
            if not isinstance(found, dict) or found.get("kind") != _KIND:
                raise ValueError(f"out: {path} is not of a run like this one: expected {_KIND!r}")
            self._check_asked(found.get("asked"))
            finished = found.get("finished")
            self.finished = finished if isinstance(finished, dict) else None
        self.there = {
            int(match[1]): entry.name
            for entry in os.scandir(self.folder)
            if (match := _NAME.fullmatch(entry.name))
        }

    def _check_asked(self, before: Any) -> None:
        before = before if isinstance(before, dict) else {}
        changed = [
            f"{name} was {json_files.shown(before.get(name))} and is "
            f"{json_files.shown(self.asked.get(name))}"
            for name in sorted(before.keys() | self.asked.keys())
            if before.get(name) != self.asked.get(name)
        ]
        if changed:
            raise ValueError(
                f"out: {self.folder} is of a run that was asked for something else "
                f"({'; '.join(changed)}): give another folder, or the same options"
            )

    def _write_about(self, finished: Mapping[str, Any] | None) -> None:
        about = {"kind": _KIND, "asked": self.asked, "finished": finished}
        write_atomically(self.folder / ABOUT, json.dumps(about, indent=2) + "\n")

    def check(self, number: int, items: Sequence[Item]) -> int:
        """How many images of a piece that is there could not be read.

        Raises ValueError where it is damaged, or not of these images.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / self.there[number]
        try:
            with json_files.opened(path) as file:
                found = pq.read_metadata(file)
            about = json_files.parse((found.metadata or {}).get(_KEY, b""), str(path), kind=dict)
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(
                f"out: {path} is damaged ({error}): remove it to have it made again"
            ) from None
        if found.num_rows != len(items) or about.get("names") != digest(items):
            raise ValueError(
                f"out: {path} holds other images than are there now: files were added, removed or "
                "renamed since. Give another folder"
            )
        columns = found.schema.to_arrow_schema()
        if any(pa.types.is_fixed_size_list(column.type) for column in columns):
            raise ValueError(
                f"out: {path} has lists of a fixed size, as an older version wrote them: remove it "
                "to have it made again, or give another folder"
            )
        return json_files.Fields(about, str(path)).integer("unreadable", 0, len(items))

    def write(
        self,
        number: int,
        items: Sequence[Item],
        errors: Sequence[str | None],
        columns: Mapping[str, np.ndarray],
    ) -> None:
        """One piece, whole or not at all. Raises OSError.

        columns: [n, width] each, null where there is an error.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        bad = np.array([error is not None for error in errors])
        arrays = {"path": pa.array([_text(item.name) for item in items], pa.string())}
        for name, values in columns.items():
            arrays[name] = _lists(values, bad)
        arrays["error"] = pa.array([None if e is None else _text(e) for e in errors], pa.string())
        about = {"piece": number, "names": digest(items), "unreadable": int(bad.sum())}
        table = pa.table(arrays).replace_schema_metadata({_KEY: json.dumps(about).encode()})
        path = self.folder / f"piece-{number:06d}.parquet"
        with replacing(path) as partial:
            pq.write_table(table, partial, compression="zstd")
        self.there[number] = path.name

    def finish(self, pieces: int, finished: Mapping[str, Any]) -> None:
        """All is there. Raises ValueError where there are more pieces than the collection has."""
        if extra := [name for number, name in sorted(self.there.items()) if number >= pieces]:
            raise ValueError(
                f"out: {self.folder / extra[0]} is beyond the collection's end: files were removed "
                "since. Give another folder"
            )
        if self.finished != finished:
            self._write_about(finished)
            self.finished = dict(finished)

    def close(self) -> None:
        """Let another run write here."""
        self._held.close()


def _text(name: str) -> str:
    """UTF-8, as Parquet wants it; bytes of a file's name that are none become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
