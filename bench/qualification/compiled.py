"""Triton's compiled kernels, carried from the machine that compiled them to one with a GPU.

Triton finds a kernel by a hash of its source, of Triton itself and of its options, with no path and
no device in it. Of what its cache keeps of a kernel, the machine code and what is said of it are
enough. The list of these files has their absolute paths, so it is written where they arrive.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qualification.checkout import ROOT

FOLDER = ROOT / "build" / "gpu-kernels"
ABOUT = "about.json"  # beside the kernels: what they were compiled by, and for what


def triton_id() -> str:
    """What of Triton is in the hash of every kernel: its version, its code and its library's."""
    from triton.runtime.cache import triton_key

    return hashlib.sha256(triton_key().encode()).hexdigest()[:16]


def pack(cache: Path, hashes: Collection[str], out: Path, about: dict[str, Any]) -> int:
    """Copy the kernels of these hashes from a cache of Triton's; how many there were.

    `out` is made anew. It has a folder a kernel, and `about` with Triton's id.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    count = 0
    for listed in sorted(cache.glob("*/__grp__*.json")):
        said = listed.with_name(listed.name.removeprefix("__grp__"))
        code = said.with_suffix(".cubin")
        if json.loads(said.read_text(encoding="utf-8"))["hash"] not in hashes:
            continue
        target = out / listed.parent.name
        target.mkdir()
        for file in (said, code):
            shutil.copy(file, target)
        count += 1
    document = {**about, "kernels": count, "triton_id": triton_id()}
    (out / ABOUT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return count


def unpack(folder: Path, cache: Path) -> int:
    """Add the kernels to a cache of Triton's that has others, or these; how many were new."""
    count = 0
    for said in sorted(folder.glob("*/*.json")):
        target = cache / said.parent.name
        listed = target / f"__grp__{said.name}"
        if listed.exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        paths = {}
        for file in (said, said.with_suffix(".cubin")):
            paths[file.name] = str(_put(target / file.name, file.read_bytes()))
        _put(listed, json.dumps({"child_paths": paths}).encode())  # last: now it can be found
        count += 1
    return count


def _put(path: Path, content: bytes) -> Path:
    """Written at once: another process may be reading."""
    made = path.with_name(f"{path.name}.{uuid.uuid4()}")
    made.write_bytes(content)
    os.replace(made, path)
    return path.absolute()


def why_not(folder: Path, arch: int) -> str:
    """Why the kernels of a folder are not for this Triton and an architecture; "" where they are.

    Of other sources they are not found, which costs nothing but the time to compile.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        theirs, found = int(about["arch"]), str(about["triton_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / ABOUT}: {type(error).__name__}: {error}"
    if theirs != arch:
        return f"they are for sm_{theirs}, this is sm_{arch}"
    if found != triton_id():
        return "they were compiled by another Triton, or for another Python"
    return ""
