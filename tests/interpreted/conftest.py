"""Runs this folder's tests in one process of their own, under Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, and changes every kernel of the process,
PyTorch's own included. So a plain `pytest` collects these tests as any others, runs the selected
ones in one child pytest with the variable set, and gives each test its own outcome as it comes.
The child is started once, and the limit of time is its own, on each test. Where it dies, the test
that it was at fails with what it printed, and those that it did not reach are skipped.
`TRITON_INTERPRET=1 pytest tests/interpreted` runs them in place, for a debugger.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from deit.kernels.device import interpreter

HERE = Path(__file__).parent

INSIDE = os.environ.get("TRITON_INTERPRET", "0") == "1"
REPORT = "DEIT_INTERPRETED_REPORT"


if INSIDE and importlib.util.find_spec("triton") is not None:
    interpreter.mend()  # tests here have kernels of their own


class _Child:
    """A pytest that runs tests interpreted, and what it has reported of them so far."""

    def __init__(self, root: Path, tmp: Path, tests: list[str]) -> None:
        report, selected, self._printed = tmp / "report.jsonl", tmp / "selected", tmp / "printed"
        selected.write_text("\n".join(tests))
        report.touch()
        self._outcomes: dict[str, list[str]] = {}
        self._dead, self._partial = False, ""
        self._report: IO[str] = report.open()
        with self._printed.open("w") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                 f"--rootdir={root}", f"@{selected}"],
                cwd=root,
                env={**os.environ, "TRITON_INTERPRET": "1", REPORT: str(report)},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def outcome(self, test: str) -> list[str]:
        """[outcome, text] of a test, as soon as there is one."""
        while test not in self._outcomes:
            running = self._process.poll() is None
            self._read()  # after `running` was asked, or its last ones could be missed
            if test not in self._outcomes and not running:
                return self._unreached()
            if test not in self._outcomes:
                time.sleep(0.05)
        return self._outcomes[test]

    def _read(self) -> None:
        *lines, self._partial = (self._partial + self._report.read()).split("\n")
        for line in lines:
            nodeid, *outcome = json.loads(line)
            self._outcomes[nodeid] = outcome

    def _unreached(self) -> list[str]:
        if self._dead:
            return ["skipped", "the interpreting pytest died before this test"]
        self._dead = True
        code, printed = self._process.returncode, self._printed.read_text(errors="replace")
        return ["failed", f"the interpreting pytest ended with {code}:\n{printed[-4000:]}"]

    def end(self) -> None:
        """Stop it where it still runs: the session is over."""
        self._process.kill()
        self._process.wait()
        self._report.close()


_CHILD = pytest.StashKey[_Child]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INSIDE:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(0))  # the child's, on the same test, holds


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Outside the interpreter: report what the child process found instead of calling the test."""
    if INSIDE:
        return None
    session = pyfuncitem.session
    if _CHILD not in session.stash:
        tests = [i.nodeid for i in session.items if HERE in i.path.parents]
        tmp = session.config._tmp_path_factory.mktemp("interpreted")
        session.stash[_CHILD] = _Child(session.config.rootpath, tmp, tests)
        session.config.add_cleanup(session.stash[_CHILD].end)
    outcome, text = session.stash[_CHILD].outcome(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


_FAULTS: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Inside, started by a `_Child`: one line a finished test, its worst phase's."""
    path = os.environ.get(REPORT)
    if path is None or not INSIDE:
        return
    if not report.passed and report.nodeid not in _FAULTS:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _FAULTS[report.nodeid] = [report.outcome, text]
    if report.when == "teardown":
        outcome = _FAULTS.pop(report.nodeid, ["passed", ""])
        with open(path, "a") as file:
            file.write(json.dumps([report.nodeid, *outcome]) + "\n")
