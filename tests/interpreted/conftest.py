"""Runs this folder's tests in one process of their own, under Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, and changes every kernel of the process,
PyTorch's own included. So a plain `pytest` collects these tests as any others, runs the selected
ones in one child pytest with the variable set, and gives each test its own outcome.
`TRITON_INTERPRET=1 pytest tests/interpreted` runs them in place, for a debugger.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deit.kernels.triton import interpreter

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for `import oracle`, also where only this folder is run

INSIDE = os.environ.get("TRITON_INTERPRET", "0") == "1"
REPORT = "DEIT_INTERPRETED_REPORT"


if INSIDE and importlib.util.find_spec("triton") is not None:
    interpreter.mend()  # tests here have kernels of their own
_OUTCOMES = pytest.StashKey[dict[str, list[str]]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(1200))  # the first one waits for all of them


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Outside the interpreter: report what the child process found instead of calling the test."""
    if INSIDE:
        return None
    session = pyfuncitem.session
    if _OUTCOMES not in session.stash:
        session.stash[_OUTCOMES] = _run_child(session)
    outcome, text = session.stash[_OUTCOMES].get(
        pyfuncitem.nodeid, ["failed", "the interpreting process did not reach this test"]
    )
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def _run_child(session: pytest.Session) -> dict[str, list[str]]:
    """Run this folder's selected tests in a child pytest; {node id: [outcome, text]}."""
    tmp = session.config._tmp_path_factory.mktemp("interpreted")
    report, selected = tmp / "report.jsonl", tmp / "selected"
    mine = [i.nodeid for i in session.items if HERE in i.path.parents]
    selected.write_text("\n".join(mine))
    root = session.config.rootpath
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={root}",
         f"@{selected}"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", REPORT: str(report)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if child.returncode not in (0, 1) or not report.exists():
        pytest.fail(f"the interpreting pytest failed:\n{child.stdout[-4000:]}", pytrace=False)
    lines = (json.loads(line) for line in report.read_text().splitlines())
    return {nodeid: [outcome, text] for nodeid, outcome, text in lines}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Inside, started by `_run_child`: one line a finished test."""
    path = os.environ.get(REPORT)
    if path is None or not INSIDE or (report.when != "call" and report.passed):
        return
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    with open(path, "a") as file:
        file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")
