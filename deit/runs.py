"""A run's folder: checkpoints that survive a crash at any moment, and its log.

    RUN/run.json             what is trained, on what, by which recipe and versions
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

MANIFEST = "manifest.json"


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

    def begin(self, about: dict[str, Any]) -> None:
        """Make the folder and say what it is of."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.root / "run.json", json.dumps(about, indent=1, default=str) + "\n")

    def log(self, **entry: Any) -> None:
        """Append one line."""
        with open(self.root / "log.jsonl", "a") as file:
            file.write(json.dumps(entry, default=str) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """The log's lines; a last one that a crash cut short is left out."""
        path = self.root / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for number, line in enumerate(lines):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                if number != len(lines) - 1:
                    raise ValueError(f"{path}: line {number + 1} is damaged") from None
        return found

    def rewind(self, update: int) -> None:
        """Drop what the log says of updates after `update`: they will be run again."""
        kept = [e for e in self.entries() if e.get("update", 0) <= update]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_atomically(self.root / "log.jsonl", text)

    def save(self, state: State) -> Path:
        """Write a checkpoint; older ones beyond `keep` go once it is on disk.

        Raises OSError (a full disk, say) with the folder as it was before.
        """
        from safetensors.torch import save_file

        target = self.checkpoints / f"{state.update:08d}"
        partial = self.checkpoints / f".{target.name}.{os.getpid()}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file(_dense(state.model), partial / "model.safetensors")
            if state.average is not None:
                save_file(_dense(state.average), partial / "average.safetensors")
            torch.save(state.rest, partial / "training.pt")
            sums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
            manifest = {"update": state.update, "sha256": sums}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            if target.exists():  # an earlier attempt of the same update
                shutil.rmtree(target)
            os.rename(partial, target)
            sync(self.checkpoints)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            # safetensors reports a full disk by an error of its own.
            if type(error).__name__ == "SafetensorError":
                raise OSError(f"{target}: {error}") from error
            raise
        for old in self._all()[self.keep :]:
            shutil.rmtree(old)
        return target

    def _all(self) -> list[Path]:
        """Checkpoints, newest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted((p for p in self.checkpoints.iterdir() if p.name.isdigit()), reverse=True)

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole; `say` is told of those that are not."""
        for path in self._all():
            reason = damage(path)
            if reason is None:
                return path
            say(f"checkpoint {path.name} is passed over: {reason}")
        return None


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
        sums = json.loads((path / MANIFEST).read_text())["sha256"]
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file; after a crash it is the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dense(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
