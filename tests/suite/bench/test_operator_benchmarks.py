"""bench/operators and its measure.py: what is timed, what is kept, what is guarded."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import deit
import report
from deit.kernels.prove import calls
from deit.kernels.prove.calls import Call, Part
from operators import int8, measure, terms
from operators import test_each_operator as suite
from operators.measure import Prepared
from race import checks

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def command(*options: str) -> subprocess.CompletedProcess[str]:
    """The suite as a user starts it, on the smallest case."""
    flags = ["--archs", "deit_ti", "--bs", "1", "--rounds", "7", "--no-compiled", "--threads", "1"]
    flags += [
        "--device",
        "cpu",
        "-k",
        "layer_norm and forward and not add",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench/operators", *flags, *options],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip


def test_a_run_leaves_evidence_and_guards_its_ratio(tmp_path: Path) -> None:
    rows_file, storage = tmp_path / "rows.json", ["--benchmark-storage", str(tmp_path)]
    done = command("--rows", str(rows_file), *storage, "--benchmark-save=base")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "time in shares of PyTorch's" in done.stdout
    document = json.loads(rows_file.read_text())
    assert document["kind"] == "operators"
    assert document["command"].endswith("--rounds=7 --no-compiled --rows rows.json")
    rows = {row["contender"]: row for row in document["rows"]}
    for row in rows.values():
        assert row["flops"] == 8 * 197 * 192
        assert row["bytes"] == 4 * (2 * 197 * 192 + 2 * 192)
        assert row["share"] > 0
        assert row["low"] <= row["seconds"] <= row["high"]
        assert row["sets"] * row["bytes"] / 2 > 32e6 or row["sets"] == measure.MOST_SETS
    assert rows["eager"]["ratio"] == 1.0
    (saved,) = tmp_path.rglob("*_base.json")
    kept = json.loads(saved.read_text())
    (case,) = kept["benchmarks"]
    mine = rows[rows["eager"]["ours"]]
    assert case["stats"]["median"] == pytest.approx(
        1 / mine["ratio"], rel=0.2
    )  # medians of a/b, b/a
    assert case["extra_info"]["contender"] == rows["eager"]["ours"]
    # If the ratio had been a hundredth of today's, today's would be a regression.
    for name in ("min", "max", "mean", "median"):
        case["stats"][name] /= 100
    saved.write_text(json.dumps(kept))
    again = command(*storage, "--benchmark-compare", "--benchmark-compare-fail=median:50%")
    assert again.returncode != 0
    assert "Performance has regressed" in again.stdout + again.stderr
    # And the page takes the rows.
    assert report.main([str(rows_file), "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"impl": "fast"}, "--impl: expected one of auto, triton, cuda, cublaslt, cpu; got 'fast'"),
        ({"rounds": 0}, "--rounds: expected at least 1; got 0"),
        ({"bs": -1}, "--bs: expected at least 1; got -1"),
        ({"archs": "resnet"}, "arch: unknown name 'resnet'"),
    ],
)
def test_bad_terms(change: dict[str, Any], why: str) -> None:
    given = {"archs": "deit_ti", "bs": None, "dtype": None, "device": "cpu", "impl": "auto",
             "threads": None, "rounds": 7, "no_compiled": True}  # fmt: skip
    assert terms.settle(given.__getitem__).batch == 16
    given |= change
    with pytest.raises(ValueError, match=re.escape(why)):
        terms.settle(given.__getitem__)


def test_plain_pytest_does_not_collect_benchmarks(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]


@pytest.mark.parametrize("part", calls.parts(), ids=lambda part: part.name)
def test_cases_are_a_deits_and_cost_something(part: Part) -> None:
    config = deit.config("deit_ti", img_size=32)
    call, again = (suite.call_of(part, config, 2, torch.float32, CPU, n) for n in (1, 2))
    for name, tensor in call.inputs.items():
        if tensor.is_floating_point() and "row_stats" not in name:
            assert not torch.equal(tensor, again.inputs[name])
            assert tensor.std() > 0  # never zeros
    assert call.flops[0] > 0
    if call.gradients:
        assert call.flops[1] > 0
    call.function("reference")(call.inputs)


def test_products_of_a_block_are_the_networks_flops() -> None:
    """A forward counted by operator and call has the FLOPs that the config states."""
    config = deit.config("deit_ti")
    total = sum(
        part.times(config.depth) * call.flops[0]
        for part in calls.parts()
        if part.times(config.depth)
        and (call := suite.call_of(part, config, 1, torch.float32, CPU, 1)).operator != "layer_norm"
    )
    head = 2 * config.embed_dim * config.num_classes
    assert total + head == config.flops


def test_inputs_exceed_the_cache() -> None:
    assert measure.copies(1e6, 32 << 20) == 101
    assert measure.copies(1e9, 32 << 20) == 2
    assert measure.copies(10, 32 << 20) == measure.MOST_SETS
    assert measure.cache_bytes(CPU) >= 32 << 20


def test_every_set_is_called_in_a_pass() -> None:
    seen: list[float] = []

    def function(inputs: dict[str, Any]) -> torch.Tensor:
        seen.append(float(inputs["x"]))
        return inputs["x"]

    sets = [Call("layer_norm", {"x": torch.tensor(float(i))}, {}, ()) for i in range(3)]
    prepared = measure.prepare(function, sets, backward=False)
    assert prepared.how == "calls"
    seen.clear()
    assert prepared.sample() > 0
    assert seen[:6] == [0.0, 1.0, 2.0] * 2


def test_seconds_are_of_one_call() -> None:
    sets = [Call("layer_norm", {"x": torch.zeros(1)}, {}, ()) for _ in range(4)]
    sleep = lambda inputs: time.sleep(0.005) or inputs["x"]
    assert 0.005 <= measure.prepare(sleep, sets, backward=False).sample() < 0.015


def test_a_wrong_contender_is_refused() -> None:
    right = torch.randn(100)
    eager = Prepared(lambda: 1.0, "calls", [right])
    off = Prepared(lambda: 1.0, "calls", [right * 1.001])
    suite.agree({"eager": eager, "cpu": eager}, torch.float32)
    with pytest.raises(checks.WrongOutputs, match=r"cpu is off by 1\.0e-03"):
        suite.agree({"eager": eager, "cpu": off}, torch.float32)
    suite.agree({"eager": eager, "cpu": off}, torch.bfloat16)
    block = Prepared(lambda: 1.0, "calls", [right, right])  # with row statistics
    suite.agree({"eager": block, "cpu": block, "cpu, by parts": eager}, torch.float32)
    with pytest.raises(ValueError, match="zip"):
        suite.agree({"eager": block, "cpu": eager}, torch.float32)


def test_ceilings_are_of_this_device() -> None:
    found = measure.measure_ceilings(CPU, torch.float32, small=True)
    assert found.copy_bytes == 2 * 4 * 2**16
    assert min(found.bytes_per_s, found.flops_per_s) > 1e6
    ceilings = measure.Ceilings(100.0, 1000.0, 1, "")
    assert (ceilings.seconds(200, 1000), ceilings.seconds(100, 5000)) == (2.0, 5.0)


def test_int8_stands_beside_fp32_with_its_own_bytes_and_error() -> None:
    config = deit.config("deit_ti")
    build = {p.name: functools.partial(suite.call_of, p) for p in calls.parts()}
    for name, expected in (
        ("linear proj + residual", {"cpu int8", "oneDNN int8"}),
        ("gelu_mlp + residual", {"cpu int8"}),
        ("layer_norm", set()),
    ):
        sets = [build[name](config, 1, torch.float32, CPU, number) for number in (1, 2)]
        functions = int8.contenders(sets[0], backward=False)
        assert set(functions) == expected
        assert int8.contenders(sets[0], backward=True) == {}
        for function in functions.values():
            for call in [*sets, sets[0]]:  # they rotate: each has its own weights
                found = function(call.inputs)
                wanted = call.function("reference")(call.inputs)
                assert checks.distance(found, wanted) < int8.ALLOWED
    dim = config.embed_dim
    linear = build["linear qkv"](config, 1, torch.float32, CPU, 1)
    assert int8.saved_bytes(linear) == 3 * 3 * dim * dim - 4 * 3 * dim
    half = build["linear qkv"](config, 1, torch.bfloat16, CPU, 1)
    assert int8.contenders(half, backward=False) == {}


def test_an_int8_row_is_measured_against_pytorchs_fp32(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    done = command("--rows", str(rows_file), "-k", "linear_qkv and forward")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(rows_file.read_text())
    assert document["kernels_scope"] == "cpu int8"
    rows = {row["contender"]: row for row in document["rows"]}
    assert {"eager", "cpu int8", "oneDNN int8"} <= set(rows)
    assert {row["best"] for row in rows.values()} == {"eager"}
    assert rows["cpu int8"]["share"] is None
    assert rows["cpu int8"]["flops"] == rows["eager"]["flops"]
    assert rows["cpu int8"]["bytes"] < rows["eager"]["bytes"]
    assert report.main([str(rows_file), "--out", str(tmp_path / "page.html")]) == 0
    assert "oneDNN int8" in (tmp_path / "page.html").read_text(encoding="utf-8")
