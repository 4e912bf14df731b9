"""bench/families.py: a line a family, and none where a contender computes something else."""

from __future__ import annotations

import pytest
import torch

import families
from deit.fused_vit import fuse

SMALL = families.Family("Small", "test_vit", size=160)
QUICK = ["--bs", "2", "--seconds", "0", "--peers", "none"]


@pytest.fixture(autouse=True)
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (SMALL,))


def test_a_line_a_family(tmp_path, capsys):
    out = tmp_path / "table.md"
    assert families.main([*QUICK, "--only", "small", "--out", str(out)]) == 0
    head, _, line = capsys.readouterr().out.splitlines()
    assert head == "| model | images/s fused | over eager | best other | n |"
    assert line.startswith("| Small (`test_vit`, 160 px) | ")
    assert line.endswith("| eager | 6 |")
    assert out.read_text().splitlines()[-1] == line


def test_what_computes_something_else_is_not_timed(monkeypatch, capsys):
    def wrong(model, **options):
        fuse(model, **options)
        with torch.no_grad():
            model.head.weight.mul_(1.001)

    monkeypatch.setattr(families, "fuse", wrong)
    assert families.main(QUICK) == 1
    printed = capsys.readouterr()
    assert "Small: fused is off by" in printed.err
    assert "Small" not in printed.out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--only", "nothing"], "only: no family has nothing in it"),
        (["--bs", "0"], "bs, seconds: expected at least 1 and at least 0; got 0 and 0.0"),
    ],
)
def test_bad_options(options, why, capsys):
    assert families.main([*QUICK, *options]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_towers_of_transformers_are_made(name):
    with torch.device("meta"):
        tower = families.Family(name, name).build()
    assert sum(p.numel() for p in tower.parameters()) > 20e6
