"""The arrows of docs/design.md: who may import whom, by the sources.

Deferred imports and those for annotations count like the others.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the lowest floor to the highest. A module imports its own room and lower floors. A room is
# named by the longest entry here that it begins with. `deit` alone stands for its __init__.
FLOORS = (
    ("deit.kernels",),
    (
        "deit.configs",
        "deit.settings",
        "deit.recipes",
        "deit.devices",
        "deit.model",
        "deit.renamed",
        "deit.tune_options",
    ),
    ("deit.data", "deit.weights"),
    ("deit", "deit.checkpoint"),
    ("deit.fused_vit",),
    ("deit.training", "deit.predict", "deit.export", "deit.attention_maps", "deit.info"),
    ("deit.tune", "deit.batch"),
    ("deit.commands",),
    ("deit.train", "deit.__main__"),
    ("bench.evidence",),
    ("bench.peers",),
    ("bench.race",),
    ("bench.studies",),
    ("bench", "bench.operators", "bench.qualification", "bench.page"),  # programs, and their parts
    ("tests",),
)
# Rooms on one floor that may know each other.
TOGETHER = [
    {"deit.configs", "deit.settings", "deit.recipes", "deit.devices", "deit.model", "deit.renamed"},
    {"bench", "bench.operators", "bench.qualification", "bench.page"},
]

# A folder of kernels/ -> the folders that it may import; prove/ may import all. What an operator
# says to prove/, in PROVED, may import prove/ too, and nothing that runs imports it.
OPERATORS = {path.parent.name for path in (ROOT / "kernels").glob("*/schema.py")}
KERNELS = {
    "engine": set(),
    "device": {"engine"},
    "measure": {"engine", "prove", *OPERATORS},
    **{each: {"engine", "device", *OPERATORS} for each in OPERATORS},
}
PROVED = ("calls", "launches")
KINDS = ("triton", "cpu", "cuda")  # how the names of implementations' files begin


def modules() -> dict[str, Path]:
    """Every module by its name as it is imported; bench's and tests' behind those words."""
    found = {}
    names = {"kernels": "deit.kernels", "deit": "deit", "bench": "bench", "tests": "tests"}
    for folder, prefix in names.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([prefix, *parts]).removesuffix(".__init__")
            if not (folder == "deit" and parts[0] == "kernels"):  # a link to kernels/
                found[name] = path
    return found


def imported(name: str, path: Path, known: Collection[str]) -> set[str]:
    """The modules of `known` that a file imports: `from package import module` is that module."""
    places = ("", "bench.", "tests.")  # whose files are imported without a prefix
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        asked: list[tuple[str, ...]] = []  # names, the most exact first
        if isinstance(node, ast.Import):
            asked = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            asked = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        for exact_first in asked:
            names = [place + each for place in places for each in exact_first]
            found |= {next((each for each in names if each in known), name)}
    return found - {name}


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items()}


def room(name: str) -> tuple[int, str]:
    """The floor of a module and its room there."""
    entries = [(len(entry), floor, entry) for floor, row in enumerate(FLOORS) for entry in row
               if name == entry or (name.startswith(f"{entry}.") and entry != "deit")]  # fmt: skip
    assert entries, f"{name} is in no room of FLOORS: say where it belongs"
    _, floor, entry = max(entries)
    return floor, entry


def may_import(importer: str, target: str) -> bool:
    (floor, own), (below, other) = room(importer), room(target)
    together = any({own, other} <= each for each in TOGETHER)
    return own == other or below < floor or together


def test_no_floor_imports_a_higher_one(edges: dict[str, set[str]]) -> None:
    wrong = [f"{name} -> {target}" for name, targets in sorted(edges.items())
             for target in sorted(targets) if not may_import(name, target)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one module (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges[name]:
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            part = [stack.pop()]
            while part[-1] != name:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def within(edges: dict[str, set[str]], prefix: str) -> dict[str, set[str]]:
    inside = {name for name in edges if name.startswith(prefix)}
    return {name: edges[name] & inside for name in inside}


def test_no_modules_of_deit_import_each_other_in_a_circle(edges: dict[str, set[str]]) -> None:
    ours = {n: t for n, t in edges.items() if n.startswith("deit") and "kernels" not in n}
    assert circles({name: targets & ours.keys() for name, targets in ours.items()}) == []


def kind(name: str) -> str:
    """Of an implementation's file: triton, cpu or cuda; "" for others."""
    return next((kind for kind in KINDS if name.rpartition(".")[2].startswith(kind)), "")


def is_proved(name: str) -> bool:
    """Whether it is there for prove/ and measure/, or in them."""
    return name.split(".")[2] in ("prove", "measure") or name.rpartition(".")[2] in PROVED


def wrong_in_kernels(edges: dict[str, set[str]]) -> list[str]:
    """What a folder of kernels/ imports that KERNELS does not allow, and what imports another
    kind of implementation."""
    wrong = []
    for name, targets in sorted(within(edges, "deit.kernels.").items()):
        folder = name.split(".")[2]
        for target in sorted(targets):
            other = target.split(".")[2]
            allowed = folder == "prove" or other == folder or other in KERNELS.get(folder, {other})
            if not is_proved(name):
                allowed &= not is_proved(target)
            elif other == "prove":
                allowed = True
            mixed = folder in OPERATORS and kind(name) and kind(target)
            if not allowed or (mixed and kind(name) != kind(target)):
                wrong.append(f"{name} -> {target}")
    return wrong


def test_kernels_import_by_their_table(edges: dict[str, set[str]]) -> None:
    wrong = [*wrong_in_kernels(edges), *map(str, circles(within(edges, "deit.kernels.")))]
    assert not wrong, "\n".join(wrong)
