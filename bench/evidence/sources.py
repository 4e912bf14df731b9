"""Which sources a contender can run, and their hash: of what they say, not of how or where.

The hash is of a scope's set of top-level statements, of Python as syntax and of C++ as tokens. It
leaves out comments, docstrings and layout, and imports of our own modules, whose paths they hold.
So a file may move, be renamed, split or joined. A name that a statement takes from another of the
project counts with that definition's own text. The hash does not see the order of the statements
of a file, or of definitions, constants and includes of C++.

Imports and includes, followed from where a contender begins, decide which statements those are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from evidence import source_cpp, source_python

BEGINS = "deit/fused_vit/"  # what of the library calls operators past the package's own names
# Products in 8 bits, by the beginning of the names of their files or folders. Files of neither kind
# know them by tables alone, and only contenders in 8 bits reach them from there.
EIGHT_BITS = {"int8": ("int8", "eight_bits"), "fp8": ("fp8", "eight_bits")}
SOURCES = {"kernels": (".py",), "csrc": (".cpp", ".cu", ".h", ".inl", ".cuh", ".hpp")}
# What `fuse` measures by: it decides which kernels run, and is in none of them.
TOOLS = ("kernels/measure/", "kernels/prove/")
UNITS = (".cpp", ".cu")
DEVICES = ("cpu", "cuda")  # csrc/cpu and csrc/cuda are a library each


def scope_of(device: str, *, int8: bool = False, fp8: bool = False) -> str:
    """Which sources a contender can run, in words: "cpu", "cpu int8", "cuda fp8", ...

    device: a torch device's type. Raises ValueError for one of which nothing is known.
    """
    if device not in DEVICES:
        raise ValueError(f"device: expected {' or '.join(DEVICES)}; got {device!r}")
    return device + " int8" * int8 + " fp8" * fp8


def read(root: Path) -> dict[str, str]:
    """Path below `root` -> text, of all that may count. Raises ValueError where there is none."""
    found = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for folder, endings in (*SOURCES.items(), (BEGINS, (".py",)))
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in endings and path.is_file()
    }
    if not any(map(_is_source, found)):
        raise ValueError(f"root: expected a tree with kernels/ and csrc/; got {root}")
    return found


def sha256(texts: Mapping[str, str], scope: str | None = None) -> str:
    """The hash of what a contender of this scope can run; None for all of kernels/ and csrc/.

    texts: path -> text, as of `read`.
    """
    return _sha256(tuple(texts.items()), scope)


@functools.lru_cache(maxsize=16)  # a file of rows asks for each
def _sha256(items: tuple[tuple[str, str], ...], scope: str | None) -> str:
    texts = dict(items)
    paths = counted(texts, scope)
    said = set(_project(texts).said({path for path in paths if path.endswith(".py")}))
    for path in paths:
        if not path.endswith(".py"):
            said.update(map(source_python.digest, source_cpp.chunks(texts[path])))
    return source_python.digest("\n".join(sorted(said)))


def counted(texts: Mapping[str, str], scope: str | None = None) -> list[str]:
    """The paths of what a contender of this scope can run, sorted."""
    if scope is None:
        return sorted(filter(_is_source, texts))
    device, _, eight = scope.partition(" ")

    def allowed(path: str, by: str = "") -> bool:
        if path.startswith(TOOLS):
            return False
        own = kinds(path)
        return not own or eight in own or bool(kinds(by))

    units = [path for path in texts if path.startswith(f"csrc/{device}/") and allowed(path)]
    python = _project(texts).reached(device, BEGINS, allowed)
    cpp = source_cpp.included(texts, (path for path in units if path.endswith(UNITS)))
    return sorted(filter(_is_source, python | cpp))


def _project(texts: Mapping[str, str]) -> source_python.Python:
    return source_python.project(tuple(each for each in texts.items() if each[0].endswith(".py")))


def _is_source(path: str) -> bool:
    folder = path.partition("/")[0]
    return path.endswith(SOURCES.get(folder, ("",))) and folder in SOURCES


def kinds(path: str) -> set[str]:
    """The 8 bits that a file is for; most files are for none."""
    parts = path.split("/")
    return {kind for kind, names in EIGHT_BITS.items() if any(p.startswith(names) for p in parts)}
