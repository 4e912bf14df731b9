"""bench/throughput.py from the command line to the evidence, on small models."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from deit.kernels import dispatch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import checks
import compiling
import contenders
import devices
import evidence
import paper_table
import peers
import progress
import race
import selection
import settings as terms
import tables
import throughput
from page import listings

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")
# One thread: beside other work on the machine, two wait for each other at every operator's end.
QUICK = [
    *("--arch", "deit_ti", "--bs", "2", "--against", "none"),
    *("--seconds", "0.5", "--peers", "none", "--threads", "1"),
]


pytestmark = pytest.mark.usefixtures("threads")  # --threads sets the whole process's


# The whole command ------------------------------------------------------------------------------


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
    ],
)
def test_bad_input_is_one_line_and_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main([*QUICK, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""


@pytest.mark.parametrize("content", [None, "text under a photograph's name"])
def test_folder_without_one_good_image_is_an_error(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "a.jpg").write_text(content)
    assert throughput.main([*QUICK, "--images", str(tmp_path)]) == 2
    assert "error: images: " in capsys.readouterr().err


# What is compared -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("deit_ti", ["resnet18", "regnety_4gf", "efficientnet_b0"]),
        ("deit_s", ["resnet101", "regnety_4gf", "efficientnet_b3"]),
        ("deit_b", ["resnet152", "regnety_16gf", "efficientnet_b4"]),
        ("deit_base_distilled_patch16_384", ["resnet152", "regnety_16gf", "efficientnet_b6"]),
    ],
)
def test_nearest_convnets_by_quoted_speed(arch: str, expected: list[str]) -> None:
    assert contenders.neighbours(contenders.deit_network(arch)) == expected


def test_neighbours_of_networks_the_table_lacks() -> None:
    for arch, size in (("deit_b", 320), ("vit_l", 224), ("deit_s", 384)):
        network = contenders.deit_network(arch, size)
        assert network.quoted is None
        assert len(contenders.neighbours(network)) == 3


def test_convnets_have_the_papers_sizes_and_flops() -> None:
    network = contenders.convnet("efficientnet_b4")
    assert network.img_size == 380
    resnet = contenders.convnet("resnet50")
    assert resnet.flops == pytest.approx(2 * 4.09e9, rel=0.01)  # 4.09 G multiply-adds, two each
    assert contenders.convnet("regnety_160").name == "regnety_16gf"
    assert len(paper_table.rows()) == 32


def test_flop_counter_agrees_with_the_config() -> None:
    network = contenders.deit_network("deit_s")
    counted = contenders.forward_flops(network.build, 224)
    assert counted == pytest.approx(network.flops, rel=1e-6)


# Checks before timing ---------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """A network with outputs off by a factor."""

    def __init__(self, module: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images) * self.factor


def tiny(dtype: torch.dtype = torch.float32) -> contenders.Contender:
    torch.manual_seed(0)
    network = contenders.deit_network("deit_ti", 32)
    return contenders.eager(network, CPU, dtype, train=False)


@pytest.mark.parametrize(
    ("dtype", "wrong"), [(torch.float32, 1.0001), (torch.bfloat16, 1.1), (torch.float32, math.nan)]
)
def test_wrong_logits_are_refused(dtype: torch.dtype, wrong: float) -> None:
    base = tiny(dtype)
    images = torch.randn(5, 3, 32, 32).to(dtype)
    oracle = checks.Oracle(base, images)
    with torch.inference_mode():
        assert oracle.verify(base, base.module(images)) < 0.05
        with pytest.raises(checks.WrongOutputs, match=r"deit_ti↑32 eager is refused: its log"):
            oracle.verify(base, Scaled(base.module, wrong)(images))
        logits = base.module(images).clone()
        logits[-1] = logits[0]  # one wrong sample at the end of a batch
        with pytest.raises(checks.WrongOutputs):
            oracle.verify(base, logits)
    with pytest.raises(checks.WrongOutputs, match="shape"):
        oracle.verify(base, torch.zeros(5, 10))


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


def test_wrong_gradients_are_refused() -> None:
    network = contenders.deit_network("deit_ti", 32)
    base = contenders.eager(network, CPU, torch.float32, train=True)
    images = torch.randn(2, 3, 32, 32)
    good = contenders.fused(base, "auto", train=True)
    base.module.pos_embed.grad = torch.ones_like(base.module.pos_embed)  # left by an earlier step
    assert checks.verify_gradients(good, base, images, torch.float32) < 1e-3
    good.call = Scaled(good.module, 1.05)
    with pytest.raises(checks.WrongOutputs, match="gradients are off"):
        checks.verify_gradients(good, base, images, torch.float32)


def test_fused_shares_weights_in_inference_and_owns_them_in_training() -> None:
    base = tiny()
    pointer = base.module.pos_embed.data_ptr()
    assert contenders.fused(base, "auto", train=False).module.pos_embed.data_ptr() == pointer
    assert contenders.fused(base, "auto", train=True).module.pos_embed.data_ptr() != pointer
    assert type(base.module.blocks[0]).__name__ == "Block"  # the eager model stays as it was


@pytest.mark.parametrize("train", [False, True])
def test_operators_are_watched_as_they_run(train: bool) -> None:
    network = contenders.deit_network("deit_ti", 32)
    base = contenders.eager(network, CPU, torch.float32, train=train)
    images = torch.randn(2, 3, 32, 32)
    assert contenders.operators_in(lambda: base.module(images)) == {}
    made = contenders.fused(base, "auto", train=train)
    step = contenders.make_step(made, torch.float32, train=train)
    seen = contenders.operators_in(lambda: step(images))
    assert {"attention" if train else "vit_block", "gelu_mlp"} <= set(seen)
    assert set(" ".join(seen.values()).split()) <= {*dispatch.IMPLEMENTATIONS, "and"}
    assert contenders.operators_in(lambda: None) == {}  # the watch was called off


def test_a_training_step_updates_the_weights() -> None:
    network = contenders.deit_network("deit_ti_distilled", 32)
    base = contenders.eager(network, CPU, torch.float32, train=True)
    before = base.module.pos_embed.detach().clone()
    step = contenders.make_step(base, torch.float32, train=True)
    assert step(torch.randn(2, 3, 32, 32)).isfinite()
    assert not torch.equal(before, base.module.pos_embed)


@pytest.mark.parametrize("arch", ["deit_ti", "deit_ti_distilled"])
def test_a_teacher_labels_for_the_last_head(arch: str) -> None:
    """Hard distillation, equation (3): half the labels' cross-entropy, half the teacher's."""
    base = contenders.eager(contenders.deit_network(arch, 32), CPU, torch.float32, train=True)
    images = torch.randn(4, 3, 32, 32)
    taught = torch.tensor([9, 8, 7, 6])
    teacher = lambda given: torch.nn.functional.one_hot(taught, 1000) * (1.0 + given.mean() * 0)
    outputs = base.module(images)
    heads = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    cross = lambda logits, labels: -logits.log_softmax(-1)[range(4), labels].mean()
    expected = (cross(heads[0], range(4)) + cross(heads[1], taught)) / 2
    found = contenders.training_loss(base, images, torch.float32, teacher)
    torch.testing.assert_close(found, expected)


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


# Verdicts ---------------------------------------------------------------------------------------


def timed(how: str, seconds: list[float]) -> contenders.Contender:
    network = contenders.deit_network("deit_ti")
    module = torch.nn.Identity()
    return contenders.Contender(network, how, "contiguous", module, module, 8, samples=seconds)


DRIFT = [1.0, 3.0, 1.2, 0.9, 2.0, 1.1, 5.0]  # seconds; a neighbour comes and goes


def test_verdict_claims_what_the_paired_ratios_keep_apart() -> None:
    fused = timed("fused", DRIFT)
    apart = tables.verdict(fused, timed("eager", [1.3 * d for d in DRIFT]))
    # The speeds' quartile ranges overlap widely; in every round eager took 1.3 times as long.
    said = "1.30x faster (paired ratio 1.300, 95 % interval 1.300 to 1.300, n=7)"
    assert apart == f"deit_ti fused vs eager: {said}"
    slower = tables.verdict(fused, timed("compiled", [d / 2 for d in DRIFT]))
    assert "fused vs compiled: 2.00x slower" in slower
    few = tables.verdict(timed("fused", DRIFT[:5]), timed("eager", [9.0] * 5))
    assert "fused vs eager: too few rounds to tell (paired ratio 7.500, n=5)" in few


def test_the_same_contender_twice_is_no_difference() -> None:
    fused = timed("fused", DRIFT)
    again = [
        d * noise for d, noise in zip(DRIFT, (1.02, 0.97, 1.01, 0.99, 1.1, 1.0, 0.98), strict=True)
    ]
    for other in (again, DRIFT, [1.004 * d for d in DRIFT]):
        said = tables.verdict(fused, timed("fused", other))
        assert "fused vs fused: no difference (paired ratio 1.00" in said


def test_speed_is_of_the_median_and_the_mean_of_seconds() -> None:
    speed = tables.speeds(timed("fused", [1.0, 2.0, 4.0]))
    assert (speed.median, speed.n) == (4.0, 3)
    assert speed.mean == pytest.approx(8 / (7 / 3))


# Budget, memory, compiling ----------------------------------------------------------------------


COMPILED = [peers.PEERS["compile"]]


def settings(**changes: object) -> terms.Settings:
    base = {"networks": [], "batch": 256, "dtype": torch.float32, "device": CPU, "budget": 540.0}
    return terms.Settings(**(base | changes))


def test_the_batch_is_shortened_with_a_reason() -> None:
    shown = progress.Progress(time.perf_counter())
    run = race.Race(settings(), shown)
    base = tiny()
    base.image_seconds = 0.25
    run.entries = [race.Entry(base.network, base, None, [base])]
    run.choose_batch()
    assert run.batch in (64, 128)
    assert f"asked for batch 256; measured at batch {run.batch}, because" in run.notes[0]
    assert "the budget is 9 min 00 s" in run.notes[0]


def test_memory_shortens_the_batch_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "available_bytes", lambda device: 2e9)
    run = race.Race(settings(budget=None), progress.Progress(time.perf_counter()))
    base = tiny()
    base.image_bytes = 100e6
    run.entries = [race.Entry(base.network, base, None, [base])]
    run.choose_batch()
    assert run.batch == 16
    assert "2.0 GB are free and an image takes 100 MB: batch 16" in run.notes[0]


def test_out_of_memory_while_warming_up_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = race.Race(settings(batch=8, budget=None), progress.Progress(time.perf_counter()))
    base = tiny()

    def step(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return base.module(images)

    base._step = step
    run.entries = [race.Entry(base.network, base, None, [base])]
    run.warm_up()
    assert (run.batch, base.batch) == (2, 2)
    assert run.notes == [
        "batch 8 does not fit in memory: trying 4",
        "batch 4 does not fit in memory: trying 2",
    ]


def test_compiling_without_time_is_not_tried() -> None:
    shown = progress.Progress(time.perf_counter() - 60)
    run = race.Race(settings(batch=2, budget=1.0, peers=COMPILED), shown)
    base = tiny()
    base.batch = 2
    run.entries = [race.Entry(base.network, base, None, [base])]
    selection.Selection(run).run()
    assert run.finalists == [base]
    assert base.tried == {"compiled": "not tried: budget"}


def test_time_limit_interrupts() -> None:
    began = time.perf_counter()
    with pytest.raises(compiling.OutOfTime), compiling.limit(0.05):
        time.sleep(30)
    assert time.perf_counter() - began < 20
    with compiling.limit(0.05):
        pass
    time.sleep(0.08)  # the alarm was called off
    with compiling.limit(None):
        pass


def test_an_abandoned_compilation_leaves_finished_ones_alone() -> None:
    double = torch.compile(lambda x: 2 * x, backend="eager")
    x = torch.ones(3)
    assert torch.equal(double(x), 2 * x)
    graphs = compiling.graphs()
    compiling.abandon()
    double(x)
    assert compiling.graphs() == graphs > 0


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


def test_step_bytes_sees_a_temporary_allocation() -> None:
    size = 64 << 20
    seen = devices.step_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert 0.9 * size < seen < 2 * size  # a page less here, a page more there
    assert devices.step_bytes(lambda: None, CPU) < 8 << 20


def test_peak_is_a_speed_at_the_dtype() -> None:
    peak = devices.Peak(CPU, torch.float32)
    peak.size = 256
    assert 1e8 < peak.measure(0.05) == peak.flops_per_s
    assert "(256³, float32, by " in str(peak)


def test_inputs_are_fresh_each_round_and_in_the_contenders_format() -> None:
    inputs = race.Inputs(CPU, torch.float32)
    base = tiny()
    first = inputs.get(base, 2, 0).clone()
    inputs.refresh(0)
    again = inputs.get(base, 2, 0)
    assert not torch.equal(first, again)
    assert again.std() > 0.5
    base.layout = "channels_last"
    assert inputs.get(base, 2, 0).is_contiguous(memory_format=torch.channels_last)


def test_zeros_and_repeated_images_are_never_timed() -> None:
    """Every batch that a round times has spread, and no two rounds of it are the same."""
    run = race.Race(settings(budget=None), progress.Progress(time.perf_counter()))
    base = tiny()
    base.batch = 2
    seen: list[torch.Tensor] = []
    base._step = lambda images: seen.append(images.clone())
    run.rounds([base], 5, [2], "timing")
    assert len(seen) == 10
    assert all(0.5 < float(images.std()) < 2 for images in seen)
    assert len({float(images.double().sum()) for images in seen}) == 5  # two calls a round


# Evidence ---------------------------------------------------------------------------------------


def tree(root: Path) -> Path:
    (root / "kernels" / "triton").mkdir(parents=True)
    (root / "csrc").mkdir()
    (root / "kernels" / "triton" / "a.py").write_text("x = 1\n")
    (root / "csrc" / "a.cpp").write_text("int x;\n")
    return root


def test_rows_go_stale_when_a_kernel_changes(tmp_path: Path) -> None:
    root = tree(tmp_path)
    row = {"kernels_sha256": evidence.kernels_sha256(root)}
    assert not evidence.is_stale(row, root)
    (root / "kernels" / "notes.md").write_text("not a kernel")
    (root / "csrc" / "lib.so").write_bytes(b"built")
    assert not evidence.is_stale(row, root)
    (root / "csrc" / "a.cpp").write_text("int y;\n")
    assert evidence.is_stale(row, root)
    assert not evidence.is_stale({"kernels_sha256": None}, root)
    with pytest.raises(ValueError, match="kernels/"):
        evidence.kernels_sha256(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("kernels/linear.py", {"cpu", "cpu int8", "cuda", "cuda int8"}),
        ("csrc/common/rows.h", {"cpu", "cpu int8", "cuda", "cuda int8"}),
        ("csrc/cpu/gemm.inl", {"cpu", "cpu int8"}),
        ("csrc/cpu/int8_simd.h", {"cpu int8"}),
        ("kernels/int8_cpu.py", {"cpu int8", "cuda int8"}),
        ("kernels/triton/int8.py", {"cuda int8"}),
        ("kernels/triton/linear.py", {"cuda", "cuda int8"}),
        ("csrc/cuda/ops.cpp", {"cuda", "cuda int8"}),
    ],
)
def test_a_row_goes_stale_by_what_its_contender_can_run(
    changed: str, stale: set[str], tmp_path: Path
) -> None:
    root = tree(tmp_path)
    path = root / changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("before")
    scopes = [evidence.scope_of(device, int8=b) for device in ("cpu", "cuda") for b in (0, 1)]
    rows = {
        scope: {"kernels_scope": scope, "kernels_sha256": evidence.kernels_sha256(root, scope)}
        for scope in [*scopes, None]
    }
    assert not any(evidence.is_stale(row, root) for row in rows.values())
    path.write_text("after")
    assert {scope for scope, row in rows.items() if evidence.is_stale(row, root)} == stale | {None}


def test_nothing_in_fp32_is_made_of_what_its_hash_leaves_out() -> None:
    """A C++ file that is no int8 one includes none; nor does a file of one device another's."""
    kept = {str(path) for path in evidence.sources(scope="cpu")}
    left = {path.name for path in evidence.sources() if str(path) not in kept}
    assert {"int8_simd.h", "int8.inl", "int8_cpu.py", "quantize.py"} <= left
    for path in evidence.sources(scope="cpu"):
        included = set(re.findall(r'#include "(?:.*/)?([^"]+)"', path.read_text(encoding="utf-8")))
        assert not included & left, path


def test_no_hash_for_an_unknown_device() -> None:
    with pytest.raises(ValueError, match="expected cpu or cuda; got 'mps'"):
        evidence.scope_of("mps", int8=False)


def test_a_renamed_kernel_is_another_kernel(tmp_path: Path) -> None:
    root = tree(tmp_path)
    before = evidence.kernels_sha256(root)
    (root / "csrc" / "a.cpp").rename(root / "csrc" / "b.cpp")
    assert evidence.kernels_sha256(root) != before


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


def test_command_line_keeps_no_folders() -> None:
    given = ["--arch", "deit_b", "--json", "/home/me/rows.json", "--images=/data/photos"]
    shown = "python bench/throughput.py --arch deit_b --json rows.json --images=photos"
    assert evidence.command_line(given) == shown
