"""`make gpu` without a GPU: its stages run, and what fails, hangs or is done is seen as such."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

import numerics  # noqa: E402
import qualify  # noqa: E402
from qualification import context as contexts  # noqa: E402
from qualification import correctness, summary  # noqa: E402
from qualification.context import Context, Poisoned  # noqa: E402

SPEED = next(stage for stage in qualify.STAGES if stage.name == "speed")


def command(out, *flags):
    """The script as `make gpu` runs it, from elsewhere and with nothing on PYTHONPATH."""
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "qualify.py"), "--out", str(out), *flags],
        capture_output=True,
        text=True,
        cwd=out.parent,
        timeout=600,
    )


def read(out, stage):
    return json.loads((out / f"{stage}.json").read_text())


def test_dry_run(tmp_path):
    """Every stage but the last on the CPU; a second run finds them finished."""
    out = tmp_path / "found"
    stages = [stage.name for stage in qualify.STAGES if stage.name != "throughput"]
    run = command(out, "--dry-run", "--minutes", "20", "--only", ",".join(stages))
    assert run.returncode == 0, run.stdout + run.stderr
    headline = run.stdout.splitlines()[len(stages)]
    assert headline == "No failures; not run: all of throughput"
    for stage in stages:
        found = read(out, stage)
        assert (found["status"], found["failures"]) == ("finished", [])
        assert all(row["stage"] == stage and row["kernels_sha256"] for row in found["rows"])
    figures = read(out, "correctness")["rows"]
    assert {row["operator"] for row in figures if row["impl"] == "triton"} == {
        "layer_norm", "linear", "attention", "cross_entropy"
    }  # fmt: skip
    assert any(row["quantity"].startswith("d ") for row in figures)
    eights = read(out, "fp8")["rows"]
    assert {row["operator"] for row in eights} == {"fp8 rounding", "fp8_linear", "fp8_gelu_mlp"}
    assert all(24 < row["sqnr_db"] < 45 for row in eights if "sqnr_db" in row)
    assert {row["check"] for row in read(out, "robustness")["rows"]} == {"repeats", "layouts"}
    timed = [row for row in read(out, "speed")["rows"] if "contender" in row]
    assert all(row["low"] <= row["microseconds"] <= row["high"] for row in timed)
    assert {row["direction"] for row in timed} == {"forward", "backward"}
    assert read(out, "tune")["rows"][0]["pinned_microseconds"] > 0
    again = command(out, "--dry-run", "--only", ",".join(stages))
    assert again.stdout.count("finished before") == len(stages)


def test_throughput_stage(tmp_path):
    out = tmp_path / "found"
    run = command(out, "--dry-run", "--minutes", "10", "--only", "throughput")
    assert run.returncode == 0, run.stdout + run.stderr
    assert {row["contender"] for row in read(out, "throughput")["rows"]} >= {"fused", "eager"}


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--only", "sped"], "--only: expected stages among environment, build"),
        (["--minutes", "0"], "--minutes: expected a positive number; got 0"),
    ],
)
def test_bad_input(tmp_path, flags, why):
    run = command(tmp_path / "out", *flags)
    assert run.returncode == 2
    assert why in run.stderr
    assert not (tmp_path / "out").exists()


def stage_of(tmp_path, code, limit, monkeypatch):
    """What run_stage makes of a stage whose process is `code`."""
    script = tmp_path / "qualify.py"
    script.write_text(code)
    monkeypatch.setattr(qualify, "HERE", tmp_path)
    options = qualify.parse(["--out", str(tmp_path), "--dry-run"])
    partial = Context("speed", tmp_path, "", True, 0.0).partial
    partial.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    qualify.run_stage(options, SPEED, limit, "command")
    return read(tmp_path, "speed"), time.monotonic() - start


FINDS = (
    "import os, sys, time, json, subprocess\n"
    "out = sys.argv[sys.argv.index('--out') + 1]\n"
    "open(out + '/parts/speed.jsonl', 'w').write(json.dumps(['rows', {'a': 1}]) + '\\n[\"ro')\n"
)


def test_a_stage_that_crashes_keeps_what_it_found(tmp_path, monkeypatch):
    found, _ = stage_of(tmp_path, FINDS + "print('why'); os.abort()", 60, monkeypatch)
    assert found["rows"] == [{"a": 1}]
    assert "crashed (killed by signal 6)" in found["failures"][0]
    assert not qualify.finished(tmp_path, SPEED)


def running(pid):
    """Whether a process lives. One that has ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_stage_that_hangs_is_killed_with_its_children(tmp_path, monkeypatch):
    child = (
        "child = subprocess.Popen(['sleep', '600'])\n"
        "open(out + '/pid', 'w').write(str(child.pid)); time.sleep(600)"
    )
    found, seconds = stage_of(tmp_path, FINDS + child, 3, monkeypatch)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):  # it has been told to end, and does so in its own time
        if not running(pid):
            break
        time.sleep(0.05)
    assert not running(pid)
    assert found["rows"] == [{"a": 1}]
    assert "stopped at its limit after" in found["failures"][0]
    assert seconds < 60


def test_a_stage_is_finished_until_the_sources_change(tmp_path, monkeypatch):
    stage = qualify.STAGES[0]
    nothing = {"failures": [], "notes": [], "rows": []}
    qualify.checkout.importable()
    import evidence

    assert not qualify.finished(tmp_path, stage)
    qualify.save(tmp_path, stage.name, "crashed", nothing)
    assert not qualify.finished(tmp_path, stage)
    qualify.save(tmp_path, stage.name, "finished", nothing)
    assert qualify.finished(tmp_path, stage)
    monkeypatch.setattr(evidence, "kernels_sha256", lambda: "another")
    assert not qualify.finished(tmp_path, stage)
    monkeypatch.undo()
    (tmp_path / f"{stage.name}.json").write_text('{"status": "fin')
    assert not qualify.finished(tmp_path, stage)


@pytest.mark.parametrize(("failures", "status"), [([], 0), (["wrong values"], 1)])
def test_exit_status_limits_and_again(failures, status, tmp_path, monkeypatch, capsys):
    """Time is shared out in proportion to what is left; what is finished gets none of it."""
    limits = {}

    def stage(options, stage, limit, command):
        limits[stage.name] = limit
        found = {"failures": failures, "notes": [], "rows": []}
        qualify.save(options.out, stage.name, "finished", found)

    monkeypatch.setattr(qualify, "run_stage", stage)
    qualify.checkout.importable()
    arguments = ["--out", str(tmp_path), "--dry-run", "--minutes", "10", "--only", "tune,speed"]
    assert qualify.main(arguments) == status
    tune, speed = (next(s for s in qualify.STAGES if s.name == name) for name in limits)
    share = tune.seconds / (tune.seconds + speed.seconds)
    assert limits["tune"] == pytest.approx(600 * share, rel=0.01)
    assert limits["speed"] == pytest.approx(600, rel=0.01)  # nothing was used up before it
    limits.clear()
    assert qualify.main(arguments) == status
    assert limits == {}
    assert qualify.main([*arguments, "--again"]) == status
    assert set(limits) == {"tune", "speed"}


def test_a_failed_stage_is_reported_first(tmp_path):
    nothing = {"notes": ["a note"], "rows": []}
    qualify.checkout.importable()
    qualify.save(tmp_path, "build", "finished", {**nothing, "failures": []})
    qualify.save(tmp_path, "speed", "finished", {**nothing, "failures": ["too slow"]})
    text, count = summary.write(tmp_path, ["build", "speed", "tune"])
    assert count == 1
    first = "1 failures; not run: all of tune"
    assert text.splitlines()[:4] == [first, "", "FAILED speed: 1", "  too slow"]
    assert "tune: not run" in text
    assert (tmp_path / "summary.txt").read_text() == text + "\n"


def test_what_did_not_run_is_in_the_headline(tmp_path):
    nothing = {"failures": [], "notes": [], "rows": []}
    qualify.checkout.importable()
    for name in ("build", "speed"):
        qualify.save(tmp_path, name, "finished", nothing)
    assert summary.write(tmp_path, ["build", "speed"])[0].startswith("No failures; all was run\n")
    parts = [f"part {number}: no time" for number in range(3)]
    qualify.save(tmp_path, "speed", "finished", {**nothing, "unrun": parts})
    qualify.save(tmp_path, "build", "finished", {**nothing, "unrun": parts[:1]})
    text, count = summary.write(tmp_path, ["build", "speed", "tune", "fp8"])
    expected = "not run: 1 part of build and 3 parts of speed and all of tune, fp8"
    assert text.splitlines()[0] == f"No failures; {expected}"
    assert "NOT RUN speed: 3\n  part 0: no time\n" in text
    assert count == 0
    assert not qualify.finished(tmp_path, SPEED)  # given again, it runs


def test_jobs_without_time_are_counted(tmp_path):
    late = Context("speed", tmp_path, "", True, time.monotonic() - 1)
    late.fan_out(["one", "two"])
    assert late.unrun == ["one: no time", "two: no time"]
    assert contexts.read_partial(late.partial)["unrun"] == late.unrun


def test_throughput_without_its_packages_is_said_not_failed(tmp_path, monkeypatch):
    from qualification import models

    monkeypatch.setattr(models, "PACKAGES", ("PIL", "no_such_package"))
    context = Context("throughput", tmp_path, "", True, time.monotonic() + 60)
    models.throughput(context)
    assert context.unrun == ["every network: bench/throughput.py needs no_such_package"]
    assert not context.failures


@pytest.mark.parametrize("name", qualify.CALLS)
def test_three_calls_are_whole_and_short(name):
    options = qualify.parse(["--out", "x", "--only", name])
    assert tuple(stage.name for stage in options.stages) == qualify.CALLS[name]
    assert options.minutes == sum(stage.seconds for stage in options.stages) / 60
    assert 8 < options.minutes < 10
    all_of_them = {stage for stages in qualify.CALLS.values() for stage in stages}
    assert all_of_them == {stage.name for stage in qualify.STAGES}


def test_a_lost_cuda_context_ends_the_process_and_other_errors_do_not(tmp_path):
    context = Context("speed", tmp_path, "", True, 0.0)

    def broken(text):
        raise RuntimeError(text)

    assert context.attempt("one", lambda: None)
    assert not context.attempt("two", lambda: broken("out of memory"))
    with pytest.raises(Poisoned):
        context.attempt("three", lambda: broken("CUDA error: an illegal memory access"))
    kept = contexts.read_partial(context.partial)["failures"]
    assert [text.split(":")[0] for text in kept] == ["two", "three"]


@pytest.mark.parametrize("always", [False, True])
def test_what_one_draw_shows_is_held_to_the_rule_over_more(tmp_path, monkeypatch, always):
    """A loss, one number, was off by an ulp where PyTorch's happened to be exact."""
    seen = []

    def compare(draws, *rest):
        seen.append([call.inputs["x"][0, 0, 0].item() for call in draws])
        used = 1.19 if always or len(draws) == 1 else 0.7
        return [numerics.Row("cpu", "linear", "out", "fp32", "random", 1e-7, 2e-8, 0.0, 0.0, used)]

    monkeypatch.setattr(numerics, "compare", compare)
    context = Context("correctness", tmp_path, "", True, time.monotonic() + 60)
    correctness.compare(context, "cpu", "linear", "fp32", (1, 5, 64), "random")
    assert [len(numbers) for numbers in seen] == [1, correctness.MORE]
    assert len(set(seen[1])) == correctness.MORE  # of which none is another
    assert len(context.failures) == always
    assert context.rows[0]["draws"] == correctness.MORE
