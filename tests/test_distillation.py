"""bench/distillation.py: its commands are ones that `deit` takes, and its statistics are right."""

import json
import sys
from pathlib import Path

import pytest
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import distillation

from deit.cli import Command

OPTIONS = distillation.Options(out=Path("runs"), seeds=2, images=100, epochs=4)


def parsed(run):
    arguments = [run.verb, *run.flags, "--out", f"runs/{run.name}"]
    return tyro.cli(Command, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


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
    run = distillation.Run("broken", "train", ("--data", str(tmp_path / "nowhere")))
    with pytest.raises(RuntimeError, match=r"deit train .*\n.*\n*.*nowhere"):
        distillation.perform(run, tmp_path, 1)
