"""bench/throughput.py from the command line to the evidence, on small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from racing import Scaled

import evidence
import throughput
from page import listings
from race import contenders, neighbour

BENCH = Path(__file__).parents[3] / "bench"
# One thread: beside other work on the machine, two wait for each other at every operator's end.
QUICK = [
    *("--arch", "deit_ti", "--bs", "2", "--against", "none"),
    *("--seconds", "0.5", "--peers", "none", "--threads", "1"),
]

pytestmark = pytest.mark.usefixtures("threads")  # --threads sets the whole process's


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[dict]]:
    """One real run as a user starts it: its stdout, stderr and evidence rows."""
    path = tmp_path_factory.mktemp("results") / "rows.json"
    command = [sys.executable, str(BENCH / "throughput.py"), *QUICK, "--device", "cpu"]
    done = subprocess.run(
        [*command, "--json", str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, evidence.read([path])


def test_run_prints_a_preliminary_figure_and_a_table(finished: tuple[str, str, list[dict]]) -> None:
    out, _, rows = finished
    assert out.startswith("preliminary, 3 rounds at batch 2: deit_ti eager ")
    for expected in ("deit_ti", "fused", "eager", "72.2", "2536.5", "quoted: arXiv 2012.12877"):
        assert expected in out
    assert f"{rows[0]['img_per_s']:.4g}" in out
    assert max(map(len, out.splitlines())) <= 120


def test_run_is_quiet_but_for_progress(finished: tuple[str, str, list[dict]]) -> None:
    lines = finished[1].splitlines()
    assert any("building and checking deit_ti" in line for line in lines)
    assert any("left]" in line for line in lines)
    assert [line for line in lines if not line.startswith("[")] == []


def test_rows_say_what_ran(finished: tuple[str, str, list[dict]]) -> None:
    rows = finished[2]
    assert [row["contender"] for row in rows] == ["fused", "eager"]
    fused, eager = rows
    assert {"vit_block", "gelu_mlp"} <= set(fused["operators"])  # the last block runs by parts
    assert fused["kernels_scope"] == "cpu"
    assert fused["kernels_sha256"] == evidence.kernels_sha256(scope="cpu")
    assert eager["operators"] is None
    assert eager["kernels_sha256"] is eager["kernels_scope"] is None
    for row in rows:
        assert (row["batch"], row["batch_asked"], row["dtype"]) == (2, 2, "fp32")
        assert len(row["seconds"]) == row["n"] >= 3
        assert row["img_per_s_low"] <= row["img_per_s"] <= row["img_per_s_high"]
        assert row["gflop_per_image"] == pytest.approx(2.507, abs=1e-3)
        assert row["memory_bytes"] > 4 * 5_717_416
        assert row["logits_error"] < 1e-4
    # Paths, of this machine or any other, have no place in a row.
    assert str(BENCH.parent) not in json.dumps(rows)
    assert rows[0]["command"].endswith("--json rows.json")


@pytest.mark.parametrize("train", [False, True])
def test_photographs_end_to_end(
    train: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pytest.importorskip("sklearn.datasets")
    for name, image in zip(("china", "flower"), data.load_sample_images().images, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.jpg")
    (tmp_path / "notes.jpg").write_text("not a photograph")
    rows_path = tmp_path / "rows.json"
    options = [*QUICK, "--device", "cpu", "--images", str(tmp_path), "--json", str(rows_path)]
    assert throughput.main([*options, *["--train"] * train]) == 0
    out = capsys.readouterr().out
    assert "2 files read, " in out
    assert ("decoding and augmenting processes" in out) == train
    assert "1 unreadable, left out: notes.jpg (not an image in a known format)" in out
    assert "2 photographs are cycled through to make" in out
    for row in evidence.read([rows_path]):
        photographs = row["photographs"]
        assert (photographs["files"], photographs["used"]) == (3, 2)
        assert photographs["unreadable"] == ["notes.jpg (not an image in a known format)"]
        assert photographs["augmented"] == train
        for key in ("loader", "model", "end_to_end"):
            assert photographs[f"{key}_img_per_s"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "deit_xl"], "arch: unknown name 'deit_xl'"),
        (["--bs", "0"], "bs: expected a positive number; got 0"),
        (["--bs", "-4"], "bs: expected a positive number; got -4"),
        (["--seconds", "0"], "seconds: expected a positive number; got 0"),
        (["--budget", "-1"], "budget: expected seconds, or 0"),
        (["--img-size", "225"], "img_size: expected a positive multiple of the patch size 16"),
        (["--against", "vgg16"], "against: unknown convnet 'vgg16'; known: resnet18, resnet50"),
        (["--teacher", "resnet18"], "teacher: it labels the batches of training; add --train"),
        (["--train", "--teacher", "vgg16"], "teacher: unknown convnet 'vgg16'"),
        (["--device", "cuda:99"], "device: torch sees"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["--protocol", "deit2021", "--dtype", "bf16"], "dtype: protocol deit2021 is fp32"),
        (["--images", "no/such/folder"], "images: expected a folder; got no/such/folder"),
        (["--neighbour", "--json", "rows.json"], "json: its rows are of a quiet machine"),
        (["--neighbour", "--images", "photos"], "neighbour: on a CPU, by the modern protocol"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main([*QUICK, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_a_neighbour_computes_on_one_core_and_ends() -> None:
    with neighbour.busy_core() as busy:
        deadline = time.monotonic() + 20
        while os.sched_getaffinity(busy.pid) != {neighbour.core()}:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert busy.poll() is None
    assert busy.poll() is not None


@pytest.mark.parametrize("content", [None, "text under a photograph's name"])
def test_folder_without_one_good_image_is_an_error(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "a.jpg").write_text(content)
    assert throughput.main([*QUICK, "--images", str(tmp_path)]) == 2
    assert "error: images: " in capsys.readouterr().err


def test_a_refused_contender_is_not_timed_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., contenders.Contender] = contenders.fused

    def wrong(*args: object) -> contenders.Contender:
        made = real(*args)
        made.call = Scaled(made.module, 1.01)
        return made

    monkeypatch.setattr(contenders, "fused", wrong)
    assert throughput.main([*QUICK, "--device", "cpu", "--img-size", "32"]) == 1
    out = capsys.readouterr().out
    assert "note: deit_ti↑32 fused is refused: its logits are off by 1.0e-02" in " ".join(
        out.split()
    )
    assert "vs eager" not in out


def test_steps_with_a_teacher_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_path = tmp_path / "rows.json"
    options = [*QUICK, "--img-size", "32", "--device", "cpu", "--json", str(rows_path)]
    assert throughput.main([*options, "--train", "--teacher", "resnet18"]) == 0
    out = capsys.readouterr().out
    assert "training steps with the labels of resnet18" in out
    assert "The teacher counts in the time alone." in out
    rows = evidence.read([rows_path])
    assert {row["teacher"] for row in rows} == {"resnet18"}
    assert "deit_ti↑32, with resnet18&#x27;s labels" in listings.models(rows, lambda _: False)


def test_schema_names_every_fault(finished: tuple[str, str, list[dict]], tmp_path: Path) -> None:
    row = dict(finished[2][0])
    evidence.check(row)
    del row["torch"]
    row |= {"batch": "2", "n": True, "colour": "red"}
    with pytest.raises(ValueError, match="torch is missing") as caught:
        evidence.check(row)
    for fault in ("colour is unknown", "batch is str, not int", "n is bool, not int"):
        assert fault in str(caught.value)
    path = tmp_path / "rows.json"
    with pytest.raises(ValueError, match="row: "):
        evidence.write(path, [row])
    assert not path.exists()
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"rows\.json: expected a JSON array"):
        evidence.read([path])


def test_measure_is_the_contenders_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_DEIT_MEASURE", "never")
    seen: list[str | None] = []
    monkeypatch.setattr(
        throughput, "settle", lambda _: seen.append(os.environ.get("FUSED_DEIT_MEASURE")) or 1 / 0
    )
    for given in ([], ["--measure", "now"]):
        with pytest.raises(ZeroDivisionError):
            throughput.main(given)
    assert seen == ["never", "now"]
    assert os.environ["FUSED_DEIT_MEASURE"] == "never"
