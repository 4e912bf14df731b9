"""The parts of `make simulate-all`: SHARD=i/n."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parent / "simulated"


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
