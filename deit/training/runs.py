"""A run's folder: checkpoints that survive a crash at any moment, and its log.

    RUN/run.json             what is trained, on what, by which recipe and versions
    RUN/verdicts.json        by which measurements its operators were chosen
    RUN/log.jsonl            one JSON object a line
    RUN/checkpoints/N/       after update N: model and average (.safetensors), the rest (.pt),
                             and manifest.json with every file's SHA-256
    RUN/model.safetensors    the final weights, and average.safetensors, their moving average

A checkpoint is written beside, flushed to disk and renamed: under its own name it is whole. One
that does not match its manifest (a disk that lied, a copy that broke) is passed over on resume,
with a message, and the one before it is taken. Nothing is unpickled: `.pt` files are read with
weights_only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import json_files
from deit.kernels.engine.json_files import Fields
from deit.weights import beside
from deit.weights.files import naming, sync, write_atomically, write_tensors

MANIFEST = "manifest.json"
VERDICTS = "verdicts.json"
LAST = 1 << 40  # updates that a log may speak of
LONGEST_LOG = 1 << 29  # bytes; a line a second is 0.4 GB a month


@dataclass
class State:
    """Everything that the next update depends on, besides the counters' own randomness."""

    update: int
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    rest: dict[str, Any]  # optimiser, scaler, scores


class RunFolder:
    """Reads and writes one run's folder; only the first process writes."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        """`keep`: checkpoints kept, the newest ones. Raises ValueError below 1."""
        if keep < 1:
            raise ValueError(f"keep: expected at least 1; got {keep}")
        self.root, self.keep = root, keep
        self.checkpoints = root / "checkpoints"

    def begin(self, about: dict[str, Any], verdicts: dict[str, Any] | None = None) -> None:
        """Make the folder and say what it is of, and which measurements it computes by."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if verdicts is not None:
            write_atomically(self.root / VERDICTS, json.dumps(verdicts, indent=1) + "\n")
        write_atomically(self.root / "run.json", json.dumps(about, indent=1, default=str) + "\n")

    def log(self, **entry: Any) -> None:
        """Append one line; raises OSError (a full disk, say) with the log as it was before."""
        path, line = self.root / "log.jsonl", (json.dumps(entry, default=str) + "\n").encode()
        with naming(path), open(path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):  # what the disk still had room for
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def about(self) -> dict[str, Any]:
        """What `run.json` says. Raises ValueError where it is none, or is not there."""
        if not (self.root / beside.RUN_FILE).is_file():
            raise ValueError(f"out: {self.root} holds weights, but no run.json to go on by")
        return beside.read_run(self.root)

    def verdicts(self) -> dict[str, Any] | None:
        """What `verdicts.json` says; None where there is none. Raises ValueError for a damaged one,
        and OSError."""
        path = self.root / VERDICTS
        return Fields(json_files.read(path), VERDICTS).values if path.exists() else None

    def entries(self, update: int | None = None) -> list[dict[str, Any]]:
        """The log's lines; a last one that a crash cut short is left out.

        `update`: only what was said until that update was made and, if so, evaluated.
        """
        path = self.root / "log.jsonl"
        lines = json_files.lines(path, most=LONGEST_LOG, finite=False) if path.exists() else []
        found = []
        for number, (name, entry) in enumerate(lines, start=1):
            if not isinstance(entry, ValueError):
                Fields(entry, name).integer("update", 0, LAST, 0)
                found.append(entry)
            elif number < len(lines):
                raise ValueError(f"{name} is damaged") from entry
        return found if update is None else [e for e in found if _said_by(update, e)]

    def rewind(self, update: int | None) -> None:
        """Drop what the log says of updates after `update`, or of all: they will be made again."""
        kept = [] if update is None else self.entries(update)
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_atomically(self.root / "log.jsonl", text)

    def save(self, state: State) -> Path:
        """Write a checkpoint; older ones beyond `keep` go once it is on disk.

        Raises OSError (a full disk, say) with the folder as it was before.
        """
        target = self.checkpoints / f"{state.update:08d}"
        partial = self.checkpoints / f".{target.name}.{os.getpid()}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with naming(target):
                _write_checkpoint(state, partial)
                if target.exists():  # an earlier attempt of the same update
                    shutil.rmtree(target)
                os.rename(partial, target)
                sync(self.checkpoints)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # The run fell back behind later checkpoints: they are damaged, or soon made again.
        there = self._all()
        whole = [path for path in there if int(path.name) <= state.update]
        for path in there:
            if path not in whole[: self.keep]:
                shutil.rmtree(path)
        return target

    def holds_something(self) -> bool:
        """Whether there is a checkpoint, be it damaged, or final weights."""
        return bool(self._all()) or (self.root / "model.safetensors").exists()

    def _all(self) -> list[Path]:
        """Checkpoints, newest first."""
        if not self.checkpoints.is_dir():
            return []
        found = (p for p in self.checkpoints.iterdir() if p.name.isdecimal())
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole; `say` is told of those that are not."""
        for path in self._all():
            reason = damage(path)
            if reason is None:
                return path
            say(f"checkpoint {path.name} is passed over: {reason}")
        return None


def _said_by(update: int, entry: dict[str, Any]) -> bool:
    """Whether an entry of the log is older than the checkpoint after `update`.

    What is said once an update is made bears its number. An unreadable image and a loss that was
    skipped are said while the next update is made.
    """
    number = entry.get("update", 0)
    return number < update or (
        number == update and not ("unreadable" in entry or "skipped" in entry)
    )


def _write_checkpoint(state: State, folder: Path) -> None:
    """All files of a checkpoint, flushed to the disk."""
    folder.mkdir(parents=True)
    write_tensors(state.model, folder / "model.safetensors")
    if state.average is not None:
        write_tensors(state.average, folder / "average.safetensors")
    with open(folder / "training.pt", "wb") as file:
        torch.save(state.rest, file)
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"update": state.update, "sha256": sums}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (folder / "training.pt", folder / MANIFEST, folder):
        sync(path)


def load_state(path: Path) -> State:
    """A checkpoint that `RunFolder.newest` found."""
    from safetensors.torch import load_file

    average = path / "average.safetensors"
    return State(
        int(path.name),
        load_file(path / "model.safetensors"),
        load_file(average) if average.exists() else None,
        torch.load(path / "training.pt", weights_only=True, map_location="cpu"),
    )


def damage(path: Path) -> str | None:
    """Why a checkpoint is not whole; None where it is."""
    try:
        found = Fields(json_files.read(path / MANIFEST), MANIFEST).fields("sha256")
        for name in found.values:
            expected = found.text(name)
            if Path(name).name != name:
                return f"{MANIFEST}: sha256: expected names of files beside it; got {name!r}"
            if _sha256(path / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with json_files.opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
