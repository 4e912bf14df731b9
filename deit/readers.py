"""Reads weights from files, without running anything that is in them.

A `.pth` file is a pickle, and unpickling runs what the file says. Here torch's restricted
unpickler reads it (`weights_only=True`), which makes tensors and plain containers and, by name,
`argparse.Namespace`: the official training checkpoints keep their options in one. What it
refuses is an error; there is no second attempt with the full unpickler.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.configs import Config
from deit.layouts import sample

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")

# Where our own files keep their configuration, in safetensors' metadata.
METADATA_KEY = "deit.config"
# Beside it, what a run says of its images: classes, statistics, recipe.
ABOUT_KEY = "deit.about"


@dataclass(frozen=True)
class Weights:
    """What was read: `state` by the source's own keys, and what a configuration beside it says.

    name: for messages. config: ours, of a file that `deit.checkpoint.save` wrote. eps: of the
    LayerNorms, from a Hugging Face config.json.
    """

    name: str
    state: dict[str, Tensor]
    config: Config | None = None
    eps: float | None = None


def read(
    source: str | os.PathLike[str] | Mapping[str, object], entry: str | None = None
) -> Weights:
    """Weights from a file, a Hugging Face model folder or a state dict.

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
        return Weights(str(path), state, config=_own_config(path, metadata))
    if path.suffix not in PICKLE_SUFFIXES:
        known = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise ValueError(f"{path}: expected a file name ending in {known}; got {path.suffix!r}")
    return Weights(str(path), choose_entry(_read_pickle(path), entry, str(path)))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def about_of(path: Path) -> dict[str, Any]:
    """What a file that `deit export` wrote says of its images; {} for any other file or folder.

    Raises ValueError naming a file whose metadata is damaged.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    text = _read_metadata(path).get(ABOUT_KEY, "{}")
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata {ABOUT_KEY!r} is damaged ({error})") from None


def _read_metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def _read_pickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged bytes surface as RuntimeError, EOFError, UnpicklingError, KeyError, ... alike.
        # torch's own message advises weights_only=False, which this one must not repeat.
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


def choose_entry(payload: object, entry: str | None, name: str) -> dict[str, Tensor]:
    """The state dict in what a file held: under `entry`, "model", "state_dict", or the whole.

    Raises ValueError where there is none, naming what there is.
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
    return dict(chosen)


def _is_state(payload: Mapping[object, object]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in payload.items())


def _read_folder(folder: Path, entry: str | None) -> Weights:
    if entry is not None:
        raise ValueError(f"entry: {folder} is a Hugging Face folder, which holds one state dict")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json, so no Hugging Face model folder")
    eps = _check_hugging_face(folder / "config.json")
    state: dict[str, Tensor] = {}
    for file in _shards(folder):
        part = _read_file(file, None).state
        if twice := state.keys() & part.keys():
            raise ValueError(f"{file}: keys that another shard has too: {sample(sorted(twice))}")
        state.update(part)
    return Weights(str(folder), state, eps=eps)


def _shards(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
            if not names or any(Path(part).name != part for part in names):
                raise ValueError(f"{index}: expected a weight_map to files in the same folder")
            return [folder / part for part in names]
    raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin, whole or sharded")


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(found).__name__}")
    return found


def _check_hugging_face(path: Path) -> float:
    """The LayerNorm eps of a config.json, once all it says is what our network computes."""
    found = _read_json(path)
    hidden = found.get("hidden_size", 768)
    # The defaults are DeiTConfig's and ViTConfig's own: older files leave them out.
    expected: dict[str, tuple[object, tuple[object, ...]]] = {
        "model_type": (None, ("deit", "vit")),
        "hidden_act": ("gelu", ("gelu",)),
        "qkv_bias": (True, (True,)),
        "num_attention_heads": (12, (hidden // 64,)),
        "intermediate_size": (3072, (4 * hidden,)),
        "patch_size": (16, (16, [16, 16])),
    }
    for key, (default, accepted) in expected.items():
        value = found.get(key, default)
        if value not in accepted:
            wanted = " or ".join(map(repr, accepted))
            raise ValueError(f"{path}: {key}: expected {wanted}; got {value!r}")
    return float(found.get("layer_norm_eps", 1e-12))


def _own_config(path: Path, metadata: Mapping[str, str]) -> Config | None:
    if METADATA_KEY not in metadata:
        return None
    try:
        return Config(**json.loads(metadata[METADATA_KEY]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata {METADATA_KEY!r} is no Config ({error})") from None
