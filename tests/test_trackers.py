"""Numbers passed on to trackers."""

import pytest

from deit.trackers import Trackers


def test_nested_numbers_get_joined_names(tmp_path):
    trackers, seen = Trackers((), tmp_path), []
    trackers.sinks.append(lambda numbers, update: seen.append((numbers, update)))
    trackers.add({"update": 3, "loss": 1.5, "model": {"top1": {"class": 20}}, "name": "x"})
    assert seen == [({"loss": 1.5, "model/top1/class": 20.0}, 3)]


def test_unknown_or_missing_trackers_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="track: expected one of tensorboard, wandb, mlflow"):
        Trackers(("excel",), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="track: wandb needs its package"):
        Trackers(("wandb",), tmp_path)
