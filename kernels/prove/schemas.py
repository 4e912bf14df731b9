"""The operators' schemas as C++ has them, in csrc/schemas: the same texts, written from Python's.

    python -m deit.kernels.prove.schemas      # writes them anew

Python defines the operators whether a library is there or not. A program in C++ has only the
library, and calls its `deit_cpu_define_schemas` or `deit_cuda_define_schemas`.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import deit.kernels  # noqa: F401 - its operators define their schemas
from deit.kernels.engine import native, registry

LIBRARIES = tuple(native.LIBRARIES)
FOLDER = native.CSRC / "schemas"
_HEAD = "// Written by `python -m deit.kernels.prove.schemas`.\n"


def in_library(kind: str) -> list[str]:
    """The schemas whose kernels the library "cpu" or "cuda" registers; those of Python's are out.

    Raises KeyError for another kind.
    """
    return sorted(registry.KERNELS[kind] - registry.MODULES[kind].keys())


def text(kind: str) -> str:
    """The file that C++ includes: a string literal and a comma for each of `in_library(kind)`."""
    literals = []
    for name in in_library(kind):
        schema = str(registry.COMPILED[kind][name]._schema).partition("::")[2]
        pieces = textwrap.wrap(
            schema, 90, drop_whitespace=False, break_long_words=False, break_on_hyphens=False
        )
        literals.append("\n    ".join(f'"{piece}"' for piece in pieces) + ",\n")
    return _HEAD + "".join(literals)


def path(kind: str) -> Path:
    """Where `text(kind)` stands."""
    return FOLDER / f"{kind}.inl"


def main() -> int:
    """Command line: writes the files; exit status 2 where there is no source tree."""
    if not native.CSRC.is_dir():
        print(f"schemas: expected the sources in {native.CSRC}; there are none", file=sys.stderr)
        return 2
    for kind in LIBRARIES:
        path(kind).write_text(text(kind), encoding="utf-8")
        print(f"{path(kind)}: {len(in_library(kind))} schemas")
    return 0


if __name__ == "__main__":
    sys.exit(main())
