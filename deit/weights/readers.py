"""Reads weights from files, without running anything that is in them.

A `.pth` file is a pickle, and unpickling runs what the file says. Here torch's restricted
unpickler reads it (`weights_only=True`), which makes tensors and plain containers and, by name,
`argparse.Namespace`: the official training checkpoints keep their options in one. What it
refuses is an error; there is no second attempt with the full unpickler.
"""

from __future__ import annotations

import argparse
import mmap
import os
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.configs import Config
from deit.kernels.engine import json_files
from deit.kernels.engine.json_files import Fields
from deit.weights import beside
from deit.weights.layouts import sample

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")

# Where our own files keep their configuration, in safetensors' metadata.
METADATA_KEY = "deit.config"
# Beside it, what a run says of its images: classes, statistics, recipe.
ABOUT_KEY = "deit.about"

# Tensors may name more bytes than are there: a stride of 0 makes gigabytes of one number. Small
# ones are taken, and weights that are tied.
ROOM, TIED = 64 << 20, 2
_NO_NAMES = ("", ".", "..")


@dataclass(frozen=True)
class Weights:
    """What was read: `state` by the source's own keys, and what says more of it than its shapes.

    name: for messages. config: ours, kept in the file or in its run's run.json; where: which of
    them. neighbour: a config.json of Hugging Face or timm, to be read once it is known whose keys
    these are (`beside.neighbour`); named: it must be of these weights, as its folder was
    asked for.
    """

    name: str
    state: dict[str, Tensor]
    config: Config | None = None
    where: str = ""
    neighbour: Path | None = None
    named: bool = False


def read(
    source: str | os.PathLike[str] | Mapping[str, object], entry: str | None = None
) -> Weights:
    """Weights from a file, a run's folder, a Hugging Face model folder or a state dict.

    `entry` picks one of several state dicts in a checkpoint; None takes "model", then
    "state_dict".

    Raises TypeError for another kind of source, FileNotFoundError for no such file, ValueError
    naming the file for one that is damaged, holds anything but weights or has no such entry.
    """
    if isinstance(source, Mapping):
        return Weights("state dict", choose_entry(source, entry, "state dict"))
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"source: expected a path or a state dict; got {type(source).__name__}"
            + (" (pass its state_dict())" if isinstance(source, torch.nn.Module) else "")
        )
    path = Path(source)
    if path.is_dir() and beside.run_of(ours := path / beside.WEIGHTS_FILE) and ours.is_file():
        path = ours
    if path.is_dir():
        return _read_folder(path, entry)
    if not path.exists():
        raise FileNotFoundError(f"no such weights file: {path} (nothing is downloaded)")
    return _read_file(path, entry)


def _read_file(path: Path, entry: str | None) -> Weights:
    if path.suffix == ".safetensors":
        if entry is not None:
            raise ValueError(f"entry: {path} is a safetensors file, which holds one state dict")
        state, metadata = _read_safetensors(path)
        config, where = _own_config(path, metadata)
        return Weights(str(path), state, config, where, beside.config_file(path))
    if path.suffix not in PICKLE_SUFFIXES:
        known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise ValueError(f"{path}: expected a file name ending in {known}; got {path.suffix!r}")
    payload, records = _read_pickle(path)
    state = choose_entry(payload, entry, str(path), path.stat().st_size)
    if records is not None and _storages(state) - records:
        raise ValueError(f"{path}: damaged: tensors of more numbers than the file keeps for them")
    return Weights(str(path), state, neighbour=beside.config_file(path))


def _read_safetensors(
    path: Path, *, tensors: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, unless they are not wanted, and its metadata."""
    from safetensors import SafetensorError, safe_open

    json_files.regular(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = file.keys() if tensors else ()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (SafetensorError, RuntimeError, TypeError) as error:  # torch's own, of shapes
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged or not a safetensors file ({reason})") from None


def about_of(path: Path) -> dict[str, Any]:
    """What a file that `deit export` wrote, or what lies beside it, says of its images; else {}.

    Raises ValueError naming a file whose metadata is damaged.
    """
    text = None
    if path.suffix == ".safetensors" and path.is_file():
        text = _read_safetensors(path, tensors=False)[1].get(ABOUT_KEY)
    if text is None:
        return beside.about_images(path)
    try:
        about = json_files.parse(text, ABOUT_KEY, kind=dict)
        beside.check_about(Fields(about, ABOUT_KEY))
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {ABOUT_KEY!r} is damaged ({error})") from None
    return about


def _read_pickle(path: Path) -> tuple[object, Counter[int] | None]:
    """What a file holds, and the sizes of its records where it is an archive of such."""
    json_files.regular(path)
    try:
        records = _check_archive(path)
        mapped = records is not None
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
        return found, records
    except Exception as error:
        # Damaged bytes surface as RuntimeError, EOFError, UnpicklingError, KeyError, ... alike.
        # torch's own message advises weights_only=False; ours must not repeat that.
        text = str(error)
        if named := re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", text):
            raise ValueError(
                f"{path}: refused, its pickle asks for {named[1]}, and weights need tensors and "
                "plain containers only; nothing in it was run"
            ) from None
        detail = re.search(r"WeightsUnpickler error:\s*(.+)", text)
        reason = detail[1] if detail else next(iter(text.splitlines()), "no details")
        raise ValueError(
            f"{path}: damaged or not a PyTorch file of plain weights "
            f"({type(error).__name__}: {reason.strip()[:200]})"
        ) from None


def _check_program(pickled: bytes | mmap.mmap) -> None:
    """Refuses the one call that torch's restricted unpickler allows and that takes any memory."""
    if pickled.find(b"bytearray") >= 0:
        raise ValueError("its pickle asks for a bytearray, and weights need none")


def _check_archive(path: Path) -> Counter[int] | None:
    """The sizes of a zip archive's records; None for torch's format before 1.6, which is none.

    An archive may be mapped into memory. A storage that claims more than its record is then never
    read beyond the file. Raises ValueError for one that unpacks to more than it holds.
    """
    with json_files.opened(path) as file:
        if file.read(4) != b"PK\x03\x04":
            if os.fstat(file.fileno()).st_size:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                    _check_program(whole)
            return None
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if packed := [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"expected records as they are; {sample(packed)} are compressed")
            if sum(r.file_size for r in records) > os.fstat(file.fileno()).st_size:
                raise ValueError("its records are larger than the file")
            for record in records:
                if record.filename.endswith("/data.pkl"):
                    _check_program(archive.read(record))
    return Counter(record.file_size for record in records)


def choose_entry(
    payload: object, entry: str | None, name: str, room: int | None = None
) -> dict[str, Tensor]:
    """The state dict in what a file held: under `entry`, "model", "state_dict", or the whole.

    room: the file's bytes. Raises ValueError where there is none, naming what there is, and for
    tensors that would take far more memory than the file.
    """
    if not isinstance(payload, Mapping):
        raise ValueError(f"{name}: expected a dictionary of tensors; got {type(payload).__name__}")
    if entry is None and not (payload and _is_state(payload)):
        entry = next((key for key in ("model", "state_dict") if key in payload), None)
    if entry is not None and entry not in payload:
        raise ValueError(f"{name}: no entry {entry!r}; it has {sample(map(str, payload))}")
    chosen = payload if entry is None else payload[entry]
    if not isinstance(chosen, Mapping) or not chosen or not _is_state(chosen):
        what = "it" if entry is None else f"its entry {entry!r}"
        holds = sample(map(str, chosen)) if isinstance(chosen, Mapping) else type(chosen).__name__
        raise ValueError(f"{name}: {what} is no state dict of named tensors (it holds {holds})")
    _check_size(chosen, name, room)
    return dict(chosen)


def _held(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _storages(state: Mapping[str, Tensor]) -> Counter[int]:
    """The bytes of each storage, however many tensors share it."""
    storages = (tensor.untyped_storage() for tensor in state.values() if _held(tensor))
    return Counter({one._cdata: one.nbytes() for one in storages}.values())


def _check_size(state: Mapping[str, Tensor], name: str, room: int | None) -> None:
    """Refuses tensors that take far more memory, once copied, than what they are views of."""
    asked = {k: t.numel() * t.element_size() for k, t in state.items() if _held(t)}
    total, there = sum(asked.values()), _storages(state)
    most = sum(size * count for size, count in there.items())
    most = most if room is None else min(most, room)
    if total > ROOM + TIED * most:
        largest = max(asked, key=asked.__getitem__)
        raise ValueError(
            f"{name}: {largest}: expected tensors of about the {most:,} bytes that are there; got "
            f"{total:,}, of {list(state[largest].shape)} with strides {state[largest].stride()}"
        )


def _is_state(payload: Mapping[object, object]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in payload.items())


def _read_folder(folder: Path, entry: str | None) -> Weights:
    if entry is not None:
        raise ValueError(f"entry: {folder} is a Hugging Face folder, which holds one state dict")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json, so no Hugging Face model folder")
    state: dict[str, Tensor] = {}
    for file in _shards(folder):
        part = _read_file(file, None).state
        if twice := state.keys() & part.keys():
            raise ValueError(f"{file}: keys that another shard has too: {sample(sorted(twice))}")
        state.update(part)
    return Weights(str(folder), state, neighbour=folder / "config.json", named=True)


def _shards(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            found = Fields(json_files.read(index), str(index)).fields("weight_map")
            names = {found.text(key) for key in found.values}
            odd = [part for part in names if Path(part).name != part or part in _NO_NAMES]
            if not names or odd or any("\0" in part for part in names):
                raise ValueError(f"{index}: expected a weight_map to files in the same folder")
            return [folder / part for part in sorted(names)]
    raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin, whole or sharded")


def _own_config(path: Path, metadata: Mapping[str, str]) -> tuple[Config | None, str]:
    """Our Config and where it came from: a file of ours, or the run of this checkpoint."""
    if METADATA_KEY not in metadata:
        run = beside.run_of(path)
        if run is None:
            return None, ""
        file = run / beside.RUN_FILE
        return beside.run_config(beside.read_run(run), file), str(file)
    where = f"{path}: its metadata {METADATA_KEY!r}"
    try:
        found = json_files.parse(metadata[METADATA_KEY], METADATA_KEY, kind=dict)
        return beside.config_of(Fields(found, METADATA_KEY)), where
    except ValueError as error:
        raise ValueError(f"{where} is no Config ({error})") from None
