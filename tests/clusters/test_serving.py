"""bench/serving.py: the LitServe example under a small load."""

import json

import pytest

import serving

pytest.importorskip("litserve", reason="litserve is not installed (make clusters)")


def test_both_servers_answer_every_request(tmp_path):
    path = tmp_path / "serving.json"
    flags = "--arch deit_ti --seconds 2 --shares 0.5 --threads 1"
    assert serving.main([*flags.split(), "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["batches"] for row in rows] == ["one at a time", "up to 8"]
    for row in rows:
        assert row["requests"] >= 20
        assert 0 < row["p50_ms"] <= row["p99_ms"]
