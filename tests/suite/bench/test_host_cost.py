"""bench/host_cost.py: it covers every operator, and the differences are those of one round."""

import json
import re

import pytest
import torch

import host_cost
from deit.kernels.device import drivers, launching
from deit.kernels.engine.operator import OPERATORS, operator_names
from deit.kernels.prove import calls
from studies import stubbed_gpu

QUICK = host_cost.Settings(rounds=2, calls=2)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_operator_is_measured_in_inference_and_in_training(tmp_path, capsys):
    path = tmp_path / "rows.json"
    host_cost.main(host_cost.Settings(rounds=2, calls=2, json=path))
    document = json.loads(path.read_text())
    assert document["kernels_sha256"]
    assert document["threads"] == 1
    for mode in ("inference", "training"):
        found = {row["operator"] for row in document["rows"] if row["mode"] == mode}
        assert set(operator_names(eight_bits=False)) <= found
    table = capsys.readouterr().out
    for row in document["rows"]:
        assert row["over_low"] <= row["over"] <= row["over_high"]
        assert row["operator"] in table


def test_training_wants_every_gradient_that_kernels_have():
    for _, call in host_cost.wanted_calls(()):
        held = set(OPERATORS[call.operator].constants.values())
        inputs = host_cost.trained(call)
        assert any(t.requires_grad for t in inputs.values())
        assert not any(inputs[name].requires_grad for name in held & set(inputs))


def test_what_is_over_the_launch_is_paired(monkeypatch):
    """A machine that slows down in the second round adds nothing to the difference."""
    monkeypatch.setattr(host_cost, "timed", lambda *_: [[7.0, 70.0], [4.0, 67.0], [1.0, 1.0]])
    row = host_cost.measure(*host_cost.wanted_calls(())[0], "inference", QUICK)
    assert (row.over_low, row.over, row.over_high) == (3.0, 3.0, 3.0)
    assert (row.call, row.launch, row.torch, row.n) == (38.5, 35.5, 1.0, 2)


@pytest.mark.parametrize(("over", "status"), [(11.0, 1), (9.0, 0)])
def test_more_than_the_limit_is_a_failure(over, status, monkeypatch, capsys):
    row = host_cost.Row("linear", "all", "inference", "cpu", 20.0, 9.0, 2.0, 8.0, over, 12.0, 2, 2)
    monkeypatch.setattr(host_cost, "measure", lambda *_: row)
    monkeypatch.setattr(host_cost, "questions", lambda _: [])
    assert host_cost.main(QUICK) == status
    assert ("above 10 us: linear all: 11.0" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            host_cost.Settings(operator=("conv",)),
            "--operator: expected among layer_norm, .* 'conv'",
        ),
        (host_cost.Settings(rounds=0), "--rounds, --calls: expected at least 1"),
    ],
)
def test_bad_options(settings, why, capsys):
    assert host_cost.main(settings) == 2
    assert re.search(why, capsys.readouterr().err)


def test_triton_operators_launch_stubbed_where_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    """Every operator and a forward; nothing of the stub stays behind."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "rows.json"
    host_cost.main(host_cost.Settings(rounds=2, calls=2, gpu=True, json=path))
    rows = json.loads(path.read_text())["rows"]
    by_triton = calls.operators(implementation="triton")
    assert {*by_triton, "whole forward"} == {row["operator"] for row in rows}
    assert {row["implementation"] for row in rows} == {"triton, launch stubbed"}
    assert "launch stubbed" in capsys.readouterr().out
    assert not isinstance(drivers.active(), stubbed_gpu.Stub)
    assert not any(kept.calls for kept in launching._all)


def test_a_stubbed_call_is_kept_and_repeated():
    (_, linear), _ = host_cost.wanted_calls(("linear",))
    call = lambda: linear.function("triton")(linear.inputs)
    with stubbed_gpu.stubbed(), stubbed_gpu.handed(drivers.active()) as launches:
        launching.forget()
        call()
        assert launches == []
        first, second = call(), call()
    assert len(launches) == 2
    addresses = [{a for a in given if isinstance(a, int)} for _, _, given in launches]
    assert first.data_ptr() in addresses[0] - addresses[1]
    assert second.data_ptr() in addresses[1] - addresses[0]
    launching.forget()
