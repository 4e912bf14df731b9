"""bench/scaling.py and studies/nodes.py: what is swept, what is fitted, what the model assumes."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import report
import scaling
from page import pictures
from race import contenders, planning
from studies import nodes, processes

TINY = "deit_ti_32"
QUICK = ["--arch", TINY, "--bs", "2", "--budget", "0", "--seconds", "0.2", "--threads", "1",
         "--device", "cpu"]  # fmt: skip
FEW = {"arch": TINY, "bs": 2, "budget": 0.0, "seconds": 0.2, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("threads")  # --threads sets the whole process's


# Sweeps -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A real run of a sweep by networks, on one thread."""
    path = tmp_path_factory.mktemp("results") / "scaling.json"
    before = torch.get_num_threads()
    sweep = ["--sweeps", "depth", "--points", "1", "4"]
    assert scaling.main([*QUICK, *sweep, "--json", str(path)]) == 0
    torch.set_num_threads(before)
    return path, json.loads(path.read_text())


def test_rows_of_a_sweep(measured: tuple[Path, dict[str, Any]]) -> None:
    document = measured[1]
    rows = document["rows"]
    assert {(row["contender"], row["x"]) for row in rows} == {
        ("fused", 1), ("fused", 4), ("eager", 1), ("eager", 4)
    }  # fmt: skip
    for row in rows:
        assert row["memory_bytes"] > 4e5
        assert row["n"] == len(row["seconds"])
        assert row["img_per_s_low"] <= row["img_per_s"] <= row["img_per_s_high"]
    shallow, deep = (
        next(r for r in rows if (r["contender"], r["x"]) == ("eager", x)) for x in (1, 4)
    )
    assert deep["memory_bytes"] > shallow["memory_bytes"]
    assert {fit["contender"] for fit in document["fits"]} == {"fused", "eager"}
    assert all(0 < fit["exponent"] < 2 for fit in document["fits"])
    assert document["command"].endswith("--json scaling.json")


def test_the_page_takes_the_document(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert report.main([str(measured[0]), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "Throughput against depth" in text
    assert measured[1]["fits"][0]["text"] in text.replace("&#x27;", "'")


def test_batches_share_their_rounds() -> None:
    options = scaling.Options(sweeps=("batch",), **FEW)
    settings = scaling.settle(options)
    torch.set_num_threads(1)
    with scaling.Progress(time.perf_counter()) as progress:
        rows = scaling.run_sweep(options, settings, "batch", progress)
    assert [(row["contender"], row["x"]) for row in rows] == [
        ("fused", 1), ("fused", 2), ("eager", 1), ("eager", 2)
    ]  # fmt: skip
    assert len({row["n"] for row in rows}) == 1
    assert all(row["batch"] == row["x"] for row in rows)
    assert len({tuple(row["seconds"]) for row in rows}) == 4  # each its own samples


def test_a_single_round_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = types.SimpleNamespace(network=scaling.scaled(TINY, "depth", 1), samples=[1.0] * 2)
    race = types.SimpleNamespace(refused=False, finalists=[cut], notes=[])
    monkeypatch.setattr(scaling.throughput, "measure", lambda *_: (race, {}))
    options = scaling.Options(sweeps=("depth",), points=(1,), **FEW)
    with pytest.raises(RuntimeError, match="2 rounds fitted into the budget; raise --budget"):
        scaling.run_sweep(options, scaling.settle(options), "depth", None)


@pytest.mark.parametrize("per_image", [True, False])
def test_the_exponent_is_that_of_the_law(per_image: bool) -> None:
    """Seconds an image ~ x^2.5 under a drift that all points of a round share."""
    drift = [1.0, 3.0, 0.5, 1.0, 1.0, 2.0, 1.0]
    rows = [
        {
            "x": x,
            "batch": batch,
            "contender": "fused",
            "seconds": [d * batch * x**2.5 for d in drift],
        }
        for x, batch in ((2, 8), (4, 8), (16, 8))
    ]
    assert scaling.exponents(rows, per_image) == pytest.approx([2.5] * 7)
    (fit,) = scaling.fits(rows, "resolution")
    assert fit["text"] == "fused: seconds an image ~ side^2.50 (95 %: 2.50 to 2.50)"
    with pytest.raises(ValueError, match="two points or more; got 1"):
        scaling.exponents(rows[:1], per_image)


def test_batch_exponent_is_of_the_whole_batch() -> None:
    rows = [
        {"x": b, "batch": b, "contender": "fused", "seconds": [0.1 * b**0.8] * 3} for b in (1, 8)
    ]
    (fit,) = scaling.fits(rows, "batch")
    assert fit["exponent"] == pytest.approx(0.8)
    assert fit["text"] == "fused: seconds a batch ~ images^0.80"  # 3 rounds: no interval


@pytest.mark.parametrize(
    ("sweep", "value", "size"),
    [("resolution", 384, ("img_size", 384)), ("depth", 24, ("depth", 24)),
     ("width", 768, ("embed_dim", 768))],
)  # fmt: skip
def test_one_size_is_scaled(sweep: str, value: int, size: tuple[str, int]) -> None:
    network = scaling.scaled("deit_ti", sweep, value)
    assert network.config is not None
    assert getattr(network.config, size[0]) == size[1]
    assert network.config.embed_dim == 64 * network.config.num_heads
    labels = {scaling.scaled("deit_ti", sweep, p).label for p in scaling.POINTS[sweep]}
    assert len(labels) == len(scaling.POINTS[sweep])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--points", "3"], "points: expected with a single sweep"),
        (["--sweeps", "nodes", "--points", "3"], "points: expected with a single sweep"),
        (["--sweeps", "depth", "--points", "0"], "points: expected positive numbers"),
        (["--sweeps", "width", "--points", "100"], "points: expected widths in multiples of 64"),
        (["--sweeps", "resolution", "--points", "100"], "img_size: expected a positive multiple"),
        (["--gbit-between", "0"], "link gbit_between: expected a positive number"),
        (["--arch", "resnet"], "arch: unknown name 'resnet'"),
    ],
)
def test_bad_input(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(options) == 2
    assert f"error: {why}" in capsys.readouterr().err


# The paper model --------------------------------------------------------------------------------

LINK = nodes.Link(gbit_between=80.0, gbit_within=800.0, per_node=8, latency_us=10.0)


def test_all_reduce_by_hand() -> None:
    # Within a node: 2 * 7/8 of 1 GB at 100 GB/s, and 2 * 3 messages of 10 us.
    within = 2 * 7 / 8 * 1e9 / 100e9 + 6 * 10e-6
    assert nodes.all_reduce_seconds(1e9, 8, LINK) == pytest.approx(within)
    # Between 4 nodes each GPU sums its eighth: 2 * 3/4 of 125 MB at 10 GB/s, 2 * 2 messages.
    between = 2 * 3 / 4 * 125e6 / 10e9 + 4 * 10e-6
    assert nodes.all_reduce_seconds(1e9, 32, LINK) == pytest.approx(within + between)
    assert nodes.all_reduce_seconds(1e9, 1, LINK) == 0


def test_model_bounds_the_step() -> None:
    step = nodes.Step(images=100, seconds=0.3, gradient_bytes=10**9)
    rows = nodes.model(step, LINK)
    assert [row["GPUs"] for row in rows] == list(nodes.COUNTS)
    for row in rows:
        n = row["GPUs"]
        summing = nodes.all_reduce_seconds(1e9, n, LINK)
        assert row["images/s at least"] == pytest.approx(n * 100 / (0.3 + summing))
        assert row["images/s at most"] == pytest.approx(n * 100 / 0.3)  # 0.2 s of backward hide it
        assert row["efficiency at least, %"] < row["efficiency at most, %"] <= 100
    falling = [row["efficiency at least, %"] for row in rows]
    assert falling == sorted(falling, reverse=True)
    slow = nodes.model(step, nodes.Link(gbit_between=1.0))[-1]
    assert slow["efficiency at most, %"] < 50  # a sum longer than the backward shows


def test_assumptions_name_every_number() -> None:
    said = " ".join(nodes.assumptions(nodes.Step(100, 0.3, 10**9), LINK, "Some GPU"))
    for part in ("Some GPU", "100 images", "300 ms", "1000 MB", "80 Gbit/s", "800 within", "8 GPUs",
                 "10 us", "67%"):  # fmt: skip
        assert part in said


def test_gradient_bytes_are_counted() -> None:
    """Four bytes a parameter of the fused network, after a real backward."""
    options = scaling.Options(sweeps=("nodes",), **FEW)
    torch.set_num_threads(1)
    with scaling.Progress(time.perf_counter()) as progress:
        step = scaling.measure_step(scaling.settle(options), progress)
    parameters = sum(p.numel() for p in scaling.scaled(TINY, "resolution", 32).build().parameters())
    assert step.gradient_bytes == 4 * parameters
    assert step.images == 2
    assert step.seconds > 0


# Processes --------------------------------------------------------------------------------------

SMALL = scaling.scaled(TINY, "depth", 1)


def test_processes_that_share_evenly() -> None:
    assert processes.points(2, 16) == (1, 2)
    assert processes.points(12, 16) == (1, 2, 4)
    assert processes.points(8, 2) == (1, 2)
    for asked, threads, batch in ((3, 4, 12), (4, 8, 6), (0, 4, 4)):
        with pytest.raises(ValueError, match=f"{threads} threads and {batch} images; got {asked}"):
            processes.check([asked], threads, batch)


@pytest.mark.parametrize("name", ["processes", "ddp"])
def test_processes_run_the_same_images(name: str, threads: Callable[[int], None]) -> None:
    threads(2)
    rows = processes.sweep(SMALL, (1, 2), 4, 0.05, train=name == "ddp")
    assert [(row["contender"], row["x"]) for row in rows] == [
        ("fused", 1), ("eager", 1), ("fused", 2), ("eager", 2)
    ]  # fmt: skip
    for row in rows:
        assert row["batch"] == 4
        assert len(row["seconds"]) == row["n"] >= planning.LEAST_ROUNDS
        assert row["img_per_s"] == pytest.approx(statistics.median(4 / s for s in row["seconds"]))
        assert row["sweep"] == name
    assert multiprocessing.active_children() == []
    fitted = scaling.fits(rows, name)
    assert [fit["points"] for fit in fitted] == [2, 2]
    assert fitted[0]["text"].startswith("fused: seconds an image ~ processes^")
    page = pictures.sweep({"rows": rows, "fits": fitted}, name).html()
    assert "Throughput against processes" in page


@pytest.mark.parametrize("train", [False, True])
def test_a_worker_that_dies_is_an_error(train: bool) -> None:
    def killed() -> None:
        with processes._workers(SMALL, 2, 1, 1, train) as pool:
            worker = multiprocessing.active_children()[1]
            worker.kill()
            worker.join()
            pool.ask("eager")

    with pytest.raises(RuntimeError, match="a worker ended before it answered"):
        killed()


@pytest.mark.parametrize(("train", "what"), [(False, "logits"), (True, "gradients")])
def test_a_worker_finds_out_what_is_wrong(train: bool, what: str) -> None:
    base = contenders.eager(SMALL, torch.device("cpu"), torch.float32, train)
    fused = contenders.fused(base, "auto", train)
    images = torch.randn(2, 3, 32, 32)
    assert processes._why_wrong(fused, base, images, train) == ""
    fused.module.blocks[0].mlp.fc2 = torch.nn.Linear(
        *reversed(base.module.blocks[0].mlp.fc2.weight.shape)
    )
    assert f"its {what} are off by" in processes._why_wrong(fused, base, images, train)


def test_a_worker_that_found_something_wrong_is_an_error() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send_bytes(b"the fused logits are off")
    with pytest.raises(RuntimeError, match="the fused logits are off"):
        processes.Pool([ours], 1).ask("fused")
