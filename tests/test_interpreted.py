"""The child process that runs tests/interpreted: started once, whatever becomes of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parent / "interpreted" / "conftest.py"

TESTS = """
import os, signal, pathlib, pytest

def test_that_passes():
    with open("starts", "a") as file:
        file.write("started\\n")

def test_that_fails():
    assert "a reason" == "another"

@pytest.mark.timeout(0.1)
def test_that_hangs():
    signal.pause()

def test_that_kills():
    os.kill(os.getpid(), signal.SIGKILL)

def test_that_is_not_reached(): pass
def test_nor_that(): pass
"""


def test_each_outcome_is_its_own_and_a_death_is_told_once(tmp_path, monkeypatch):
    for name in ("CI", "BUILD_NUMBER"):  # there pytest's summary says every message again
        monkeypatch.delenv(name, raising=False)
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_them.py").write_text(TESTS)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", f"--rootdir={tmp_path}", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    ).stdout
    outcomes = dict(reversed(line) for line in re.findall(r"^(\w+) \S+::(\w+)", found, re.M))
    assert outcomes == {
        "test_that_passes": "PASSED",
        "test_that_fails": "FAILED",
        "test_that_hangs": "FAILED",
        "test_that_kills": "FAILED",
    }
    assert "SKIPPED [2]" in found
    assert "a reason" in found
    assert "Timeout (>0.1s)" in found
    assert found.count("the interpreting pytest ended with -9:\n") == 1
    assert (tmp_path / "starts").read_text() == "started\n"
