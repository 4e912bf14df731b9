"""bench/distillation.py: its commands are ones that `deit` takes, and its statistics are right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import distillation
import evidence
import report
from deit.commands import flags
from deit.commands.cli import Command
from page import distillation as drawing
from studies import outcomes

OPTIONS = distillation.Options(out=Path("runs"), seeds=2, images=100, epochs=4)


def parsed(run):
    arguments = [run.verb, *run.flags, "--out", f"runs/{run.name}"]
    return flags.cli(Command, arguments)


def test_every_run_is_a_command_that_builds_on_earlier_ones():
    names = set()
    for run in distillation.plan(OPTIONS):
        assert set(run.after) <= names, run
        assert run.name not in names
        names.add(run.name)
        options = parsed(run).options()
        folders = {Path(f).name for f in (options.weights, options.teacher) if f}
        assert folders <= set(run.after), run
    rows = {**distillation.ROWS, **distillation.HIGHER_ROWS}
    assert {f"{arm}-{seed}" for arm, _, _ in rows.values() for seed in (0, 1)} <= names


def test_the_arms_differ_in_what_is_distilled_only():
    arms = {run.name: parsed(run).options() for run in distillation.plan(OPTIONS)}
    plain = arms["none-1"]
    for name, kind, token in (("soft", "soft", False), ("token", "hard", True)):
        options = arms[f"{name}-1"]
        assert (options.distillation.kind, options.distilled) == (kind, token)
        assert options.recipe == plain.recipe
        assert options.seed == plain.seed == 1
        assert options.shape == plain.shape
        assert options.limit_train == plain.limit_train
    assert arms["token-up-1"].img_size == 40
    assert arms["token-up-1"].distillation.kind == "hard"
    assert arms["token-up-labels-1"].distilled
    assert arms["token-up-labels-1"].distillation.kind == "none"


def test_precision_is_compared_on_the_same_seeds_and_recipe():
    given = distillation.Options(out=Path("runs"), seeds=2, dtype="bf16", plain=("none", "token"))
    runs = {run.name: run for run in distillation.plan(given)}
    arms = {name: parsed(run).options() for name, run in runs.items()}
    for way in ("none", "token"):
        plain, fused = arms[f"{way}-plain-1"], arms[f"{way}-bf16-1"]
        assert (plain.dtype, plain.fuse) == ("fp32", False)
        assert (fused.dtype, fused.fuse) == ("bf16", True)
        same = {"out": None, "dtype": "fp32", "fuse": True}
        assert replace(plain, **same) == replace(fused, **same)
        # Not even cuDNN's convolutions of the plain one take TF32.
        assert runs[f"{way}-plain-1"].environment == {"NVIDIA_TF32_OVERRIDE": "0"}
        assert not runs[f"{way}-bf16-1"].environment
    assert "soft-plain-0" not in runs
    assert (arms["teacher"].dtype, arms["soft-bf16-0"].dtype) == ("fp32", "bf16")
    up = arms["token-up-bf16-1"]
    assert (up.dtype, Path(up.weights).name) == ("bf16", "token-bf16-1")
    # In fp32 the commands, and so the folders of earlier runs, are as they were.
    assert "token-1" in {run.name for run in distillation.plan(OPTIONS)}


def log(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_are_means_over_the_same_updates(tmp_path):
    # Updates 1 to 4 have the losses 8, 4, 2, 2: logged by twos, and otherwise.
    one = [{"update": 2, "loss": 6.0}, {"update": 2, "unreadable": "x"}, {"update": 4, "loss": 2.0}]
    other = [{"update": 1, "loss": 8.0}, {"update": 3, "loss": 3.0}, {"update": 4, "loss": 2.0}]
    log(tmp_path / "one", one)
    log(tmp_path / "other", other)
    found = outcomes.curves({"plain": [tmp_path / "one"], "fused": [tmp_path / "other"]})
    # Of the line over updates 2 and 3 half is taken.
    assert found == {"updates": [2.0, 4.0], "plain": [[6.0, 2.0]], "fused": [[5.5, 2.5]]}


def test_long_logs_make_short_curves(tmp_path):
    log(tmp_path / "run", [{"update": 5 * n, "loss": 1.0} for n in range(1, 1000)])
    found = outcomes.curves({"plain": [tmp_path / "run"]})
    assert len(found["updates"]) == len(found["plain"][0]) == outcomes.POINTS
    assert set(found["plain"][0]) == {1.0}


def test_differences_are_paired_by_seed():
    # Gains 1, 2, 3: mean 2, deviation 1, and t(2) = 4.303: half the interval is 4.303 / sqrt(3).
    found = distillation.difference([81.0, 72.0, 93.0], [80.0, 70.0, 90.0])
    assert found["gain"] == 2.0
    assert found["interval"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-3)


def test_the_last_evaluation_counts(tmp_path):
    lines = [
        {"update": 1, "average": {"top1": {"class": 10.0}}},
        {"update": 2, "average": {"top1": {"class": 20.0}}},
        {"update": 3, "loss": 1.0},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert distillation.score(tmp_path) == {"class": 20.0}


def test_a_failed_run_is_named_with_its_last_words(tmp_path):
    pytest.importorskip("tyro", reason="tyro is not installed")
    run = distillation.Run("broken", "train", ("--data", str(tmp_path / "nowhere")))
    with pytest.raises(RuntimeError, match=r"deit train .*\n.*\n*.*nowhere"):
        distillation.perform(run, tmp_path, 1)


@pytest.fixture(params=["fp32", "bf16"])
def document(request, tmp_path):
    """A result of two seeds, written by the program itself from logs that runs may leave.

    That in bf16 holds students trained in fp32, too.
    """
    how = {"dtype": "bf16", "plain": ("token",)} if request.param == "bf16" else {}
    scores = {
        "none": (70.0, 72.0),
        "soft": (71.0, 72.5),
        "hard": (73.0, 71.0),
        "token": (75.0, 76.0),
    }
    options = distillation.Options(
        out=tmp_path, seeds=2, images=100, epochs=4, finetune_epochs=1, **how
    )
    for run in distillation.plan(options):
        arm, _, seed = run.name.replace("-bf16", "").rpartition("-")
        top1 = scores.get(arm.removesuffix("-up"), (80.0, 81.0))[int(seed) if seed.isdigit() else 0]
        heads = dict.fromkeys(("class", "distillation", "softmax-sum"), top1)
        entry = {"update": 4, "model": {"top1": heads}, "average": {"top1": heads}}
        loss = 1.5 if "plain" in run.name else 1.53
        log(tmp_path / run.name, [{"update": 2, "loss": 2.0}, {"update": 4, "loss": loss}, entry])
        (tmp_path / run.name / "model.safetensors").touch()  # found: nothing is trained
    path = tmp_path / "result.json"
    flags = f"--out {tmp_path} --json {path} --seeds 2 --images 100 --epochs 4 --finetune-epochs 1"
    flags += " --dtype bf16 --plain token" * bool(how)
    assert distillation.main(flags.split()) == 0
    return path


@pytest.mark.parametrize("width", [356, 900])
def test_every_seed_is_drawn_beside_its_mean_interval_and_the_papers(document, width):
    made = report.drawn(report.load([document]))
    names = [picture.name for picture in made]
    assert names[:2] == ["distillation", "distillation-up"]
    (axes,) = made[0].draw(width).axes
    marks = {line.get_gid()[4:]: line for line in axes.lines if line.get_gid()}
    seeds = {tip: line for tip, line in marks.items() if "seed " in tip}
    assert list(seeds)[:4] == [
        "usual (soft), seed 0: 71.00 %, +1.00",
        "usual (soft), seed 1: 72.50 %, +0.50",
        "hard label, seed 0: 73.00 %, +3.00",
        "hard label, seed 1: 71.00 %, -1.00",
    ]
    assert len(seeds) == 2 * 5
    # The mean 0.75 and t(1) = 12.706 times 0.3536 / sqrt(2): 3.18 at each side.
    assert "usual (soft): +0.75, -2.43 to +3.93" in marks
    assert "hard label: 74.3 % in the paper, +2.1" in marks
    at = [float(line.get_xdata()[0]) for line in seeds.values()]
    assert at[:4] == pytest.approx([1.0, 0.5, 3.0, -1.0])
    low, high = axes.get_xlim()
    assert all(low < x < high for x in at)
    content = json.loads(document.read_text())
    assert names[2:] == (["precision-token"] if content["dtype"] == "bf16" else [])
    assert drawing.drawn({**content, "kind": "else"}) == []


@pytest.mark.parametrize("document", ["bf16"], indirect=True)
@pytest.mark.parametrize("width", [356, 900])
def test_losses_of_two_precisions_are_drawn_over_each_other(document, width):
    content = json.loads(document.read_text())
    plain, fused = content["precision"]
    assert (plain["row"], fused["row"]) == ("token: fp32, plain", "token: bf16, fused")
    # The plain students' logs say 80 and 81 %, the fused ones' 75 and 76.
    assert (fused["gains"], fused["gain"]) == ([-5.0, -5.0], -5.0)
    assert content["kernels_sha256"]
    picture = report.drawn(report.load([document]))[2]
    assert "differ by 2 % at most" in picture.caption
    assert "80.50 % in fp32" in picture.caption
    assert "-5.00 points (-5.00 to -5.00" in picture.caption
    (axes,) = picture.draw(width).axes
    solid, dashed = (
        [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == style]
        for style in ("-", "--")
    )
    assert len(solid) == len(dashed) == 2  # a line a seed
    (low, high), points = axes.get_xlim(), solid + dashed
    assert all(low < x < high for line in points for x, _ in line)
    (first, last), (_, above) = points[0], points[-1]
    assert first[1] > above[1] > last[1]  # losses of 2.0, 1.53 and 1.5


def test_the_committed_result_has_its_picture():
    found = report.load([evidence.RESULTS / "distillation.json"])
    assert "distillation" in [picture.name for picture in report.drawn(found)]
