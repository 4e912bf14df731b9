"""What the last build of csrc/ made, and of which sources. Standard library only: setup.py uses it.

The record is a JSON file beside the libraries, written by every build, a failed one included:

    {"time": "2026-01-31T12:00:00+00:00", "torch": "2.11.0", "sources": "<sha256>",
     "libraries": {"cpu":  {"built": true, "file": "_cpu.abi3.so", "compiler": "g++ ...",
                            "architectures": ["avx512", ...], "seconds": 12.3},
                   "cuda": {"built": false, "reason": "no nvcc: ..."}}}
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FILE = "_build.json"
KINDS = ("cpu", "cuda")


def read(folder: Path) -> dict[str, Any] | None:
    """The record in `folder`; None where there is none or it is not one."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "libraries" in record else None


def write(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def sources_hash(csrc: Path) -> str | None:
    """sha256 over the names and contents of the sources; None where there are none (a wheel)."""
    if not csrc.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
