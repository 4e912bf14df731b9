"""Imports by the names that modules had before they moved."""

import importlib
import subprocess
import sys

import pytest

from deit.renamed import RENAMED


@pytest.mark.parametrize("old", RENAMED)
def test_a_module_is_found_by_its_old_name(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {RENAMED[old]}"):
        found = importlib.import_module(old)
    new = importlib.import_module(RENAMED[old])
    assert found is new
    assert new.__spec__.name == RENAMED[old]


def test_the_warning_is_the_importers():
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "try:\n    from deit import networks\n"
        "except DeprecationWarning as error: print(error.__traceback__.tb_lineno, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3 deit.networks is now deit.weights.networks\n"


def test_others_are_still_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"deit\.nothing"):
        importlib.import_module("deit.nothing")
