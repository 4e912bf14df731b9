"""bench/loader.py: a small measurement, whole."""

import json

import loader
import report


def test_every_way_is_timed_and_kept(tmp_path, capsys):
    path = tmp_path / "loader.json"
    flags = "--img-size 32 --bs 6 --rounds 2 --device cpu"
    assert loader.main([*flags.split(), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["way"] for row in found["rows"]] == [
        loader.DECODE,
        loader.WHOLE,
        loader.DRAWN,
        loader.DEVICE,
    ]
    for row in found["rows"]:
        assert 0 < row["img_per_s_low"] <= row["img_per_s"] <= row["img_per_s_high"]
    assert found["bytes_workers"] == 4 * found["bytes_device"] == 4 * 6 * 3 * 32 * 32
    assert found["worker_gain_interval"] is None  # of two rounds nothing can be said
    assert "images/s" in capsys.readouterr().out
    assert "worker_gain" in report.make(report.load([path]))


def test_bad_data_is_said(tmp_path, capsys):
    assert loader.main(["--data", str(tmp_path / "nowhere"), "--device", "cpu"]) == 2
    assert "expected a folder" in capsys.readouterr().err
