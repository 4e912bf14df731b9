"""Compiled contenders: not tried without time, checked where they are."""

from __future__ import annotations

import time
from pathlib import Path

from racing import settings, tiny

import peers
from race import contenders, progress, race, selection

COMPILED = [peers.PEERS["compile"]]


def test_compiling_without_time_is_not_tried() -> None:
    shown = progress.Progress(time.perf_counter() - 60)
    run = race.Race(settings(batch=2, budget=1.0, peers=COMPILED), shown)
    base = tiny()
    base.batch = 2
    run.entries = [race.Entry(base.network, base, None, [base])]
    selection.Selection(run).run()
    assert run.finalists == [base]
    assert base.tried == {"compiled": "not tried: budget"}


def test_compiled_contender_is_checked_and_times_its_compilation(tmp_path: Path) -> None:
    run = race.Race(settings(batch=2, budget=None), progress.Progress(time.perf_counter()))
    networks = [contenders.deit_network("deit_ti", 32)]
    run.settings = settings(batch=2, budget=None, networks=networks, peers=COMPILED)
    run.prepare()
    run.warm_up()
    selection.Selection(run).run()
    assert [c.how for c in run.finalists] == ["fused", "eager", "compiled"]
    made = run.finalists[-1]
    assert made.compile_seconds > 0
    assert made.logits_error < 1e-4
    assert made.batch == 2
