"""Command lines by tyro, and where it is missing: the same dataclasses from the same words."""

from __future__ import annotations

import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
SCRIPTS = [
    "throughput", "table5", "scaling", "loader", "report", "everything", "numerics", "host_cost",
    "int8_kernels", "parity", "distillation", "eight_bits_accuracy",
]  # fmt: skip


def run(path, *arguments):
    """A script's process, in which tyro cannot be imported."""
    code = (
        "import runpy, sys; sys.modules['tyro'] = None; sys.argv[:] = sys.argv[1:]\n"
        "sys.path.insert(0, '.'); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code, path, *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT / "bench", env={"COLUMNS": "100"},
    )  # fmt: skip


PARSE = """
    import dataclasses
    import sys
    from pathlib import Path
    from typing import Annotated, Literal
    from deit.commands import flags

    @dataclasses.dataclass(frozen=True)
    class Link:
        speed: float = 1.0
        "GB/s, 100 % of it."

    @dataclasses.dataclass(frozen=True)
    class Options:
        files: flags.Positional[tuple[Path, ...]] = ()
        count: int = 3
        "How many."
        maybe: Annotated[int | None, flags.arg(metavar="INT")] = None
        kind: Literal["a", "b"] = "a"
        names: tuple[str, ...] = ("x",)
        fast: bool = True
        slow: bool = False
        told: int = dataclasses.field(default=1, metadata={"help": "In its line."})
        link: Annotated[Link, flags.arg(name="")] = dataclasses.field(default_factory=Link)

    print(flags.parse(Options, sys.argv[1:], "Does it."))
"""
LINES = [
    [],
    ["--count", "4", "--maybe", "5", "--kind", "b", "--names", "y", "z", "--no-fast", "--slow"],
    ["one", "two", "--speed", "2.5"],
    ["--names"],
]


@pytest.fixture
def script(tmp_path):
    (tmp_path / "parse.py").write_text(textwrap.dedent(PARSE))
    return tmp_path / "parse.py"


@pytest.mark.parametrize("line", LINES)
def test_without_tyro_the_same_options(script, line, capsys, monkeypatch):
    plain = run(script, *line)
    assert plain.returncode == 0, plain.stderr
    monkeypatch.setattr(sys, "argv", [str(script), *line])
    runpy.run_path(str(script), run_name="options")
    assert plain.stdout == capsys.readouterr().out


def test_without_tyro_help_and_bad_input(script):
    shown = run(script, "--help")
    assert shown.returncode == 0
    for text in (
        "Does it.",
        "How many.",
        "In its line.",
        "GB/s, 100 % of it.",
        "--no-fast",
        "[PATH ...]",
    ):
        assert text in shown.stdout
    wrong = run(script, "--kind", "c")
    assert wrong.returncode == 2
    assert "--kind" in wrong.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_of_bench_need_no_tyro(name):
    shown = run(f"{name}.py", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--" in shown.stdout


def test_the_command_says_what_it_needs(tmp_path):
    code = (
        "import sys; from deit.commands.cli import Tune, main; assert Tune().candidates == 40\n"
        "sys.exit(main(['info']))"
    )
    (tmp_path / "command.py").write_text(code)
    shown = run(tmp_path / "command.py")
    assert shown.returncode == 2
    assert "needs the package tyro (pip install tyro)" in shown.stderr
