"""The command line itself: quick help, exit codes, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import MISSING
from pathlib import Path

import pytest

from deit import settings
from deit.commands import cli, flags
from deit.commands.train import Fixres, Train
from deit.recipes import RECIPES, recipe
from deit.training.options import Options

pytest.importorskip("tyro", reason="tyro is not installed")


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


COMMANDS = (
    "info", "predict", "train", "finetune", "fixres", "eval", "report", "export", "explain-image",
    "tune",
)  # fmt: skip


@pytest.mark.parametrize("command", [[], ["predict"], ["train"]])
def test_help_does_not_wait_for_torch(command):
    code = (
        "import sys\nfrom deit.commands.cli import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0, end\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "usage: deit" in result.stdout


def test_module_and_help_list_the_subcommands():
    result = python("-m", "deit", "--help")
    assert result.returncode == 0
    for word in COMMANDS:
        assert word in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_written_for_users(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for inside in ("type: ignore", "noqa", "default: None", "default: )", "{None}", "'\"'", "[["):
        assert inside not in text


def test_a_report_of_nothing_is_refused(capsys):
    assert cli.main(["report"]) == 2
    assert "runs: expected the folder of at least one run" in capsys.readouterr().err


def test_help_names_a_settings_value_in_every_recipe(capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "update rule (adamw; deit3 lamb)" in text


def test_flags_change_the_recipe_and_nothing_else():
    words = "--data x --out y --recipe deit3 --lr 1e-3 --ema None --betas 0.8 0.9 --depth 2"
    command = flags.cli(Train, words.split())
    options = command.options()
    assert options.recipe == recipe("deit3", lr=1e-3, ema=None, betas=(0.8, 0.9))
    assert options.shape.changes() == {"depth": 2}
    assert (options.data, str(options.out)) == ("x", "y")


def test_every_setting_of_a_run_is_a_flag_with_its_default_and_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    defaults = vars(Train("x", "y"))
    for group, line, _ in settings.lines(Options):
        flag = settings.flag(line)
        assert f"--{flag.replace('_', '-')}" in text
        assert line.metadata["help"] in text
        if group != "recipe" and line.default is not MISSING:
            assert defaults[flag] == line.default


def test_without_flags_the_options_are_those_of_python():
    assert Train("x", Path("y")).options() == Options("x", Path("y"))
    adapted = Fixres("x", Path("y")).options()
    assert (adapted.recipe, adapted.img_size) == (RECIPES["fixres"], 384)
    assert adapted.train_only == "classifier"


@pytest.mark.parametrize("arguments", [["bake"], ["predict", "--no-such-flag"], []])
def test_unknown_words_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "deit" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError])
def test_bad_input_is_one_line(kind, monkeypatch, capsys):
    def refuse(self):
        raise kind("a message\nof two lines")

    monkeypatch.setattr(cli.Predict, "run", refuse)
    assert cli.main(["predict", "x.jpg"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "deit: error: a message of two lines\n")
    monkeypatch.setenv("DEIT_TRACEBACK", "1")
    with pytest.raises(kind):
        cli.main(["predict", "x.jpg"])


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    def fail(self):
        raise AttributeError("a bug")

    monkeypatch.setattr(cli.Predict, "run", fail)
    with pytest.raises(AttributeError, match="a bug"):
        cli.main(["predict", "x.jpg"])


def test_exit_codes_reach_the_shell():
    result = python("-m", "deit", "predict", "x.jpg")
    assert result.returncode == 2
    assert result.stderr.startswith("deit: error: --weights: expected a file")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["info"], ["train", "--help"]])
def test_a_closed_pipe_is_no_error(arguments):
    code = (
        "import sys\nfrom deit.commands import cli\n"
        "cli.Info.run = lambda self: [print('x' * 1000) for _ in range(10000)] and 0\n"
        f"sys.exit(cli.main({arguments}))"
    )
    result = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -n 1; exit ${PIPESTATUS[0]}', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "BrokenPipe" not in result.stderr
