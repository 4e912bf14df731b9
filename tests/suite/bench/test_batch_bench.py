"""bench/batch.py: a small measurement, whole."""

import json

import pytest

import batch

pytest.importorskip("pyarrow", reason="pyarrow is not installed")


def test_decoding_and_a_collection(tmp_path, capsys):
    path = tmp_path / "batch.json"
    flags = "--archs deit_ti --sizes 500x375 --batch-size 2 --seconds 0.1 --rounds 1 --workers 1"
    assert batch.main([*flags.split(), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    rows = {row["way"]: row for row in found["decoding"]["500x375"]}
    assert rows["exact"]["most"] == rows[batch.BEFORE]["most"] == 0
    assert rows["fast"]["most"] == 1
    network, device = found["together"]
    assert network["images"] == device["images"] >= 16
    for row in (network, device):
        assert min(row["decoder"], row["network"], row["end_to_end"]) > 0
    said = capsys.readouterr().out
    assert "of bound" in said
    assert "the load before was" in said
