"""The command line itself: quick help, exit codes, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deit import cli


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", [[], ["predict"], ["info"]])
def test_help_does_not_wait_for_torch(command):
    code = (
        "import sys\nfrom deit.cli import main\n"
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
    for word in ("info", "predict"):
        assert word in result.stdout


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


def test_a_closed_pipe_is_no_error():
    code = (
        "import sys\nfrom deit import cli\n"
        "cli.Info.run = lambda self: [print('x' * 1000) for _ in range(10000)] and 0\n"
        "sys.exit(cli.main(['info']))"
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
