"""bench/everything.py: what is done, what is run again, and where results go."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import everything
import evidence
import host_cost
import loader
import report
import scaling
import table5
import throughput
from deit.commands import flags
from evidence import paper_table

FACTS = {"device": "some CPU", "torch": "2.11"}
JOB = everything.Job("throughput", "python bench/throughput.py --arch deit_ti --bs 4")
OPTIONS: dict[str, type] = {
    "throughput": throughput.Options, "scaling": scaling.Options, "table5": table5.Options,
    "loader": loader.Options, "host_cost": host_cost.Settings,
}  # fmt: skip


def found(*changes: dict) -> report.Found:
    """Results of `JOB`, each with changes of its own; "now" is the hash of today's kernels."""
    row = {**FACTS, "command": f"{JOB.command} --json a.json", "kernels_sha256": "now"}
    return report.Found([row | each for each in changes], {}, {None: "now"})


@pytest.mark.parametrize(
    ("changes", "done"),
    [
        ([], False),
        ([{}], True),
        ([{}, {"kernels_sha256": None}], True),
        ([{}, {"kernels_sha256": "before"}], False),
        ([{"device": "another"}], False),
        ([{"torch": "2.12"}], False),
        ([{"command": f"{JOB.command}0 --json a.json"}], False),
    ],
)
def test_done_is_what_has_rows_of_this_device_and_these_kernels(
    changes: list[dict], done: bool
) -> None:
    assert everything.done(JOB, found(*changes), FACTS, "cpu") is done


def test_table5_is_done_when_it_has_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    job = everything.Job("table5", "python bench/table5.py")
    names = [paper_table.label(network) for network in paper_table.networks()]
    all_of_it = [
        {"command": "python bench/table5.py --only x", "network": name, "protocol": protocol,
         "threads": 2, "batch": 1, "batch_asked": 256}
        for name in names
        for protocol in ("modern", "deit2021")
    ]  # fmt: skip
    facts = FACTS | {"threads": 2}
    monkeypatch.setattr(evidence, "kernels_sha256", lambda *_: "now")
    assert everything.done(job, found(*all_of_it), facts, "cpu")
    assert not everything.done(job, found(*all_of_it[1:]), facts, "cpu")
    for change in ({"kernels_sha256": "before"}, {"torch": "2.12"}, {"batch_asked": 1}):
        changed = [all_of_it[0] | change, *all_of_it[1:]]
        assert not everything.done(job, found(*changed), facts, "cpu")


@pytest.mark.parametrize("kind", everything.JOBS)
def test_every_command_is_one(kind: str) -> None:
    for job in everything.JOBS[kind]:
        program, script, *words = shlex.split(job.command)
        if program == "python":
            flags.parse(OPTIONS[Path(script).stem], words, None)
            again = evidence.command_line([*words, "--json", "/x/y.json"], Path(script).name)
            assert everything.plain(again) == job.command  # as its results will have it
        else:
            assert script == "bench/operators"


def test_results_of_other_commands_stay(tmp_path: Path) -> None:
    quick = "--against none --peers none --seconds 0.2 --threads 1 --device cpu"
    job = everything.Job("throughput", f"{JOB.command} {quick}")
    path = tmp_path / "throughput-x.json"
    assert everything.measure(job, path) == ""
    first = evidence.read([path])
    assert {everything.plain(row["command"]) for row in first} == {job.command}
    other = [row | {"command": "python bench/throughput.py --arch deit_s"} for row in first]
    evidence.write(path, other + [row | {"network": "old"} for row in first])
    assert everything.measure(job, path) == ""
    rows = evidence.read([path])
    assert rows[: len(other)] == other
    assert {row["network"] for row in rows[len(other) :]} == {"deit_ti"}
    bad = everything.Job("x", "python bench/loader.py --bad")
    assert everything.measure(bad, path) == "no results, exit status 2"
    assert evidence.read([path]) == rows


def test_show_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--show", "--device", "cpu", "--results", str(tmp_path), "--only"]
    assert everything.main([*arguments, "scaling"]) == 0
    out = capsys.readouterr().out
    assert "0 of 1 benchmarks are done" in out
    assert "1 of 1: python bench/scaling.py" in out
    assert list(tmp_path.iterdir()) == []
    assert everything.main([*arguments, "nothing"]) == 2
    assert "only: expected among throughput, " in capsys.readouterr().err
