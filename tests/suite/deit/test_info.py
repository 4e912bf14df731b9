"""`deit info`: complete, in plain data, and true when something is missing."""

import json

import pytest
import torch

import deit.info
from deit.kernels.engine import dispatch, native
from deit.kernels.engine.operator import OPERATORS


def test_collect_is_plain_data_and_covers_everything():
    data = json.loads(json.dumps(deit.info.collect()))
    assert data["versions"]["torch"] == torch.__version__
    assert set(data["operators"]) == set(OPERATORS)
    assert set(data["libraries"]) == {"cpu", "cuda"}
    assert data["cpu"]["threads"] == torch.get_num_threads()
    assert {"model", "vendor", "family", "model_number", "instruction_sets"} <= data["cpu"].keys()
    for operator, devices in data["operators"].items():
        reasons = devices["cpu"]["reasons"]
        assert set(reasons) == set(dispatch.IMPLEMENTATIONS)
        assert reasons["reference"] == []
        assert reasons["cuda"], operator
        # What "auto" is said to run is one that can.
        assert reasons[devices["cpu"]["auto"]] == []


@pytest.mark.skipif(bool(native.why_not("cpu")), reason="the C++ library is not built")
def test_says_what_auto_runs():
    operators = deit.info.collect()["operators"]
    x = torch.randn(2, 3, 192)
    with torch.no_grad():
        chosen = dispatch.explain("attention", x, 1).chosen
    assert operators["attention"]["cpu"]["auto"] == chosen
    reasons = operators["fp8_linear"]["cpu"]["reasons"]
    assert reasons["cpu"] == ["it has no fp8_linear kernel"]


def test_a_missing_library_is_named_with_its_reason(monkeypatch, tmp_path):
    reason = "the cpu library was not built: no C++ compiler: none of c++, g++"
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "why_not", lambda kind: (reason,))
    monkeypatch.setattr(dispatch, "environment", lambda implementation, device, index: (reason,))
    data = deit.info.collect()
    assert data["libraries"]["cpu"]["usable"] is False
    assert data["operators"]["layer_norm"]["cpu"]["auto"] == "reference"
    assert data["cpu"]["library_uses"] is None
    text = " ".join(deit.info.report().split())
    assert reason in text
    assert "cannot be used" in text


def test_the_report_shows_every_operator_and_a_stale_library(monkeypatch):
    status = native.status

    def stale(kind):
        return {**status(kind), "stale": True}

    monkeypatch.setattr(native, "status", stale)
    text = deit.info.report()
    assert all(name in text for name in OPERATORS)
    assert "stale: csrc/ has changed" in " ".join(text.split())


def test_info_prints(capsys):
    assert deit.info.info() is None
    out = capsys.readouterr().out
    assert "Versions" in out
    assert "Operators on cpu" in out
