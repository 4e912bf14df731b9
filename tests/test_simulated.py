"""The parts of `make simulate-all`, SHARD=i/n, and the tables of what they showed."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parent / "simulated"


@pytest.fixture(autouse=True)
def _modules_of_the_folder(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


class Item:
    def __init__(self, folder):
        self.path = folder / "test_some.py"


def _select(items, left_out):
    """What the folder's conftest makes of tests."""
    spec = importlib.util.spec_from_file_location("conftest_of_simulated", FOLDER / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    return items


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_each_test_is_in_one_part(parts, monkeypatch):
    every, others = [Item(FOLDER) for _ in range(16)], [Item(FOLDER.parent)]
    seen = []
    for number in range(1, parts + 1):
        monkeypatch.setenv("SHARD", f"{number}/{parts}")
        left_out = []
        kept = _select([*others, *every], left_out)
        assert kept[0] is others[0]  # of another folder
        assert {*kept[1:]}.isdisjoint(left_out)
        assert len(kept[1:]) + len(left_out) == len(every)
        seen += kept[1:]
    assert len(seen) == len(every)
    assert {*seen} == {*every}


@pytest.mark.parametrize("asked", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_a_part_that_there_is_not_is_refused(asked, monkeypatch):
    monkeypatch.setenv("SHARD", asked)
    with pytest.raises(pytest.UsageError, match="SHARD: expected i/n with 1 <= i <= n"):
        _select([Item(FOLDER)], [])


def _case(arch, used, launches=3, unchecked=0, what="linear"):
    row = {"what": what, "dtype": "bf16", "arch": arch, "used": used}
    return {**row, "launches": launches, "unchecked": unchecked}


PARTS = (
    [{**_case(90, 19.0), "case": "run again"}, _case(90, 0.25), _case(80, 0.5),
     _case(90, 0.755, 4), _case(90, 0.1, what="attention"),
     {"run": "all", "stage": "test_operators", "tests": 4, "failed": 0, "seconds": 7.4}],
    [{**_case(90, 0.3), "case": "run again"}, _case(80, 0.75, unchecked=1),
     {"what": "linear", "dtype": "fp16", "arch": 89, "kernels": 5, "launches": 9, "unchecked": 0},
     {"what": "linear", "dtype": "bf16", "arch": 89, "kernels": 2, "launches": 2, "unchecked": 0},
     {"fault": "a cut", "kernel": "linear_kernel", "case": "linear-sm_90", "found": "a lean"},
     {"run": "all", "stage": "test_operators", "tests": 1, "failed": 1, "seconds": 2.2}],
)  # fmt: skip

TABLES = """
**simulated GPUs: largest share of what the rule allows**

| operator | dtype | sm_80 | sm_90 | cases | launches | not searched for races |
|---|---|---|---|---|---|---|
| attention | bf16 |  | 0.10 | 1 | 3 | 0 |
| linear | bf16 | 0.75 | 0.76 | 5 | 16 | 1 |

**simulated GPUs: kernels of the launches that ship**

| operator | sm_89 | launches | not searched for races |
|---|---|---|---|
| linear | 7 | 11 | 0 |

**simulated GPUs: seeded faults**

| fault | kernel | seen on | found by |
|---|---|---|---|
| a cut | linear_kernel | linear-sm_90 | a lean |

**simulated GPUs: time**

| run | stage | tests | failed | seconds of a core |
|---|---|---|---|---|
| make simulate-all | test_operators | 5 | 1 | 10 |
"""


def test_the_rows_of_all_parts_are_tables(tmp_path, monkeypatch, capsys):
    figures = importlib.import_module("figures")
    page, files = tmp_path / "page.md", [tmp_path / "rows-1.json", tmp_path / "rows-2.json"]
    page.write_text("<!-- figures -->\n**triton, fp32**\n\n| 1 |\n<!-- end -->\n")
    for file, part in zip(files, PARTS, strict=True):
        file.write_text(json.dumps(part))
    monkeypatch.setattr(figures, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, files)])
    figures.main()
    told = f"<!-- figures -->\n\n**triton, fp32**\n\n| 1 |\n{TABLES}\n<!-- end -->\n"
    assert page.read_text() == told
    assert "8 cases, 30 launches, 1 of them not searched for races" in capsys.readouterr().out


def test_a_terminal_has_the_same_in_columns():
    shown = importlib.import_module("shown")
    table = shown.tables(PARTS[0][1:])[shown.RULE]
    assert shown.aligned(table)[1:] == [
        "attention  bf16           0.10      1         3                       0",
        "linear     bf16    0.50   0.76      3        10                       0",
    ]


@pytest.mark.parametrize("text", [None, "", "[{"])
def test_a_file_that_holds_no_rows_is_named(text, tmp_path, monkeypatch):
    figures, file = importlib.import_module("figures"), tmp_path / "rows-3.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["figures.py", str(file)])
    with pytest.raises(SystemExit, match=r"rows-3.json: expected the rows that DEIT_SIMULATED="):
        figures.main()
