"""bench/table5.py: what is measured, what is not measured again, and what the table says."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import evidence
import table5
from evidence import devices, paper_table
from race import compiling, contenders

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_network_of_the_table_can_be_built() -> None:
    rows = paper_table.networks()
    assert len(rows) == 26
    assert sum(len(paper_table.recipes(row)) for row in rows) == len(paper_table.rows()) == 32
    for row in rows:
        network = contenders.quoted_network(row)
        assert network.label == paper_table.label(row)
        assert network.quoted == row
        with torch.device("meta"):
            parameters = sum(p.numel() for p in network.build().parameters()) / 1e6
        # The paper rounds; it prints ResNet-50 as 25 (25.6), RegNetY-4GF as 21 (20.6).
        assert parameters == pytest.approx(row.params_m, rel=0.06, abs=1.0), row
    assert contenders.quoted_network(rows[17]).label == "vit_l_16↑384"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One real run of one network, on one thread."""
    path = tmp_path_factory.mktemp("results") / "rows.json"
    before = torch.get_num_threads()
    assert table5.main([*QUICK, "--json", str(path)]) == 0
    torch.set_num_threads(before)
    return path, evidence.read([path])


QUICK = ["--only", "deit_ti", "--protocols", "deit2021", "--bs", "1", "--limit", "0",
         "--threads", "1", "--device", "cpu"]  # fmt: skip


def test_rows_are_the_races(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = measured[1]
    assert {row["contender"] for row in rows} == {"fused", "eager"}
    for row in rows:
        assert (row["network"], row["protocol"], row["dtype"]) == ("deit_ti", "deit2021", "fp32")
        assert (row["parameters"], row["quoted_v100_img_per_s"]) == (5_717_416, 2536.5)
        assert row["command"].startswith("python bench/table5.py --only deit_ti --protocols deit2")


def test_a_finished_network_is_not_measured_again(
    measured: tuple[Path, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, rows = measured
    timed: list[str] = []

    def stub(network: contenders.Network, *_: object) -> list[dict[str, Any]]:
        timed.append(network.label)
        return rows

    monkeypatch.setattr(table5, "measure", stub)
    assert table5.main([*QUICK, "--json", str(path)]) == 0
    assert timed == []
    out = capsys.readouterr().out
    mean = next(row["img_per_s_mean"] for row in rows if row["contender"] == "fused")
    for figure in ("72.2", "2536.5", "5.7", "2.5", f"{mean:.4g}"):
        assert figure in out
    assert table5.main([*QUICK, "--again", "--json", str(path)]) == 0
    assert timed == ["deit_ti"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, False),
        ({"kernels_sha256": "changed since"}, True),
        ({"torch": "2.0"}, True),
        ({"threads": 99}, True),
        ({"batch_asked": 2, "batch": 2}, True),
        ({"batch_asked": 256, "batch": 32}, True),
        ({"batch_asked": 256, "batch": 1}, False),  # one is what one asked for gives, too
        ({"protocol": "modern"}, True),
    ],
)
def test_what_makes_a_row_unfinished(
    measured: tuple[Path, list[dict[str, Any]]], change: dict[str, Any], again: bool
) -> None:
    torch.set_num_threads(1)
    rows = [row | change for row in measured[1]]
    facts = devices.describe(CPU)
    assert table5.finished(rows, "deit_ti", "deit2021", facts, 1) is not again


def test_heavy_networks_go_by_two_on_a_cpu_unless_asked() -> None:
    options = table5.Options(device="cpu")
    assert table5.batch_of(options, "efficientnet_b4↑380") == 16
    assert table5.batch_of(options, "efficientnet_b5↑456") == 2
    assert table5.batch_of(replace(options, bs=8), "efficientnet_b5↑456") == 8
    facts = devices.describe(CPU)
    heavy = replace(options, only=("efficientnet_b8",), protocols=("modern",))
    assert [table5.paper_table.label(q) for q, _ in table5.missing([], heavy, facts)] == [
        "efficientnet_b8↑800"
    ]


def test_a_stale_figure_is_starred(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    row = paper_table.quoted("deit_ti", 224)
    assert row is not None
    fresh = table5.cells(row, measured[1], "deit2021")
    old = [each | {"kernels_sha256": "x"} for each in measured[1] if each["contender"] == "fused"]
    stale = table5.cells(row, old + measured[1][1:], "deit2021")
    assert stale[5] == fresh[5] + "*"
    assert table5.cells(row, [], "deit2021")[5:] == ["-"] * 4


def test_a_network_that_fails_or_overruns_leaves_the_others(
    measured: tuple[Path, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stub(network: contenders.Network, *_: object) -> list[dict[str, Any]]:
        if network.label == "resnet18":
            raise RuntimeError("its logits are off")
        if network.label == "resnet50":
            raise compiling.OutOfTime
        return [row | {"network": network.label} for row in measured[1]]

    monkeypatch.setattr(table5, "measure", stub)
    path = tmp_path / "rows.json"
    assert table5.main(["--only", "resnet,deit_s", "--protocols", "modern", "--json", str(path)])
    assert {row["network"] for row in evidence.read([path])} == {
        "resnet101", "resnet152", "deit_s"
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert "no figures: resnet18 (modern)\nno figures: resnet50 (modern)" in out
    assert "RuntimeError: its logits are off" in err
    assert "given up" in err


def test_limits_of_the_whole_table() -> None:
    networks = [contenders.quoted_network(row) for row in paper_table.networks()]
    options = table5.Options(device="cpu")
    limits = {
        protocol: [table5.limit_of(network, protocol, options) for network in networks]
        for protocol in ("modern", "deit2021")
    }
    assert sum(limits["modern"]) + sum(limits["deit2021"]) < 54 * 60
    assert min(limits["deit2021"]) >= 20
    given = table5.Options(device="cpu", limit=5.0)
    assert {table5.limit_of(network, "modern", given) for network in networks} == {5.0}


def test_a_network_costs_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """One peak for all, no early figure; a convnet compiled in one format, or two with no limit."""
    measured: list[torch.dtype] = []
    monkeypatch.setattr(table5.devices.Peak, "measure", lambda self, _: measured.append(self.dtype))
    table5.peak.cache_clear()
    seen = []

    def stop(settings: Any, *_: Any) -> Any:
        seen.append(settings)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(table5.throughput, "measure", stop)
    network = contenders.deit_network("deit_ti")
    for limit in (30.0, 0.0):
        with pytest.raises(RuntimeError, match="seen enough"):
            table5.measure(network, "modern", table5.Options(device="cpu", limit=limit), None)
    table5.peak.cache_clear()
    assert measured == [torch.float32]
    assert seen[0].peak is seen[1].peak is not None
    assert [(each.formats, each.early) for each in seen] == [(1, False), (2, False)]


def test_a_single_round_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race that the limit cut short is run again with a larger one, not kept as finished."""
    network = contenders.deit_network("deit_ti")
    module = torch.nn.Identity()
    cut = contenders.Contender(network, "eager", "contiguous", module, module, 2, samples=[1.0] * 2)
    race = types.SimpleNamespace(refused=False, finalists=[cut], notes=[])
    monkeypatch.setattr(table5.throughput, "measure", lambda *_: (race, {}))
    with pytest.raises(RuntimeError, match="2 rounds fitted into the limit; raise --limit"):
        table5.measure(network, "modern", table5.Options(device="cpu"), None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--only", "vgg"], "only: expected beginnings of resnet18, "),
        (["--bs", "0"], "bs: expected 1 or more; got 0"),
        (["--limit", "-1"], "limit: expected seconds, or 0 for none; got -1"),
        (["--device", "tpu"], "device: expected auto, cpu"),
    ],
)
def test_bad_input(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert table5.main([*options, "--show"]) == 2
    assert f"error: {why}" in capsys.readouterr().err


def test_a_limit_within_a_limit_leaves_the_outer_one_running() -> None:
    def inner_ends_first() -> None:
        with compiling.limit(0.1):
            with contextlib.suppress(compiling.OutOfTime), compiling.limit(0.02):
                time.sleep(5)
            inner.append(True)
            time.sleep(5)

    inner: list[bool] = []
    with pytest.raises(compiling.OutOfTime):
        inner_ends_first()
    assert inner == [True]
