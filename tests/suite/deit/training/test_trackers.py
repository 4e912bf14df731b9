"""Numbers passed on to trackers."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import training

from deit.training.trackers import Trackers
from deit.training.trainer import train


def test_nested_numbers_get_joined_names(tmp_path):
    trackers, seen = Trackers((), tmp_path), []
    trackers.sinks.append((lambda numbers, update: seen.append((numbers, update)), lambda: None))
    trackers.add({"update": 3, "loss": 1.5, "model": {"top1": {"class": 20}}, "name": "x"})
    assert seen == [({"loss": 1.5, "model/top1/class": 20.0}, 3)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_unknown_or_missing_trackers_are_named(name, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="track: expected one of tensorboard, wandb, mlflow"):
        Trackers(("excel",), tmp_path)
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"track: {name} needs its package \(pip install {name}"):
        Trackers((name,), tmp_path)


def test_tensorboard_shows_a_run_that_went_on_as_one(data, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    for epochs in (1, 2):
        options = training.options(data, tmp_path, recipe_epochs=epochs, track=("tensorboard",))
        result = train(options)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    shown = found.Scalars("model/top1/class")
    assert [event.step for event in shown] == [3, 6]
    assert shown[-1].value == pytest.approx(result["model"]["top1"]["class"])


class Recorder:
    """Stands in for wandb and mlflow: they are services, which no test can have."""

    def __init__(self):
        self.begun, self.ended, self.active, self.kept = [], 0, False, []

    def init(self, **given):
        self.begun.append(given)
        return SimpleNamespace(log=lambda numbers, step: None, finish=self.end_run)

    def start_run(self, run_id, run_name):
        assert not self.active, "mlflow refuses a second run"
        self.begun.append({"id": run_id})
        self.active = True
        return SimpleNamespace(info=SimpleNamespace(run_id="17"))

    def log_metrics(self, numbers, step):
        assert self.active
        self.kept += [(name, step) for name in numbers]

    def MlflowClient(self):
        return self

    def get_metric_history(self, run_id, name):
        assert run_id == "17"
        return [SimpleNamespace(step=step) for known, step in self.kept if known == name]

    def end_run(self):
        self.ended, self.active = self.ended + 1, False


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_services_are_told_that_a_run_goes_on_and_ends(name, data, tmp_path, monkeypatch):
    service = Recorder()
    monkeypatch.setitem(sys.modules, name, service)
    for epochs in (1, 2):
        train(training.options(data, tmp_path, recipe_epochs=epochs, track=(name,)))
    first, second = (given["id"] for given in service.begun)
    assert second == ("17" if name == "mlflow" else first)
    assert service.ended == 2


def test_mlflow_which_keeps_a_step_twice_is_given_it_once(tmp_path, monkeypatch):
    service = Recorder()
    monkeypatch.setitem(sys.modules, "mlflow", service)
    for goes_on_after, updates in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        trackers = Trackers(("mlflow",), tmp_path, goes_on_after)
        for update in updates:
            trackers.add({"update": update, "loss": 0.5})
        trackers.add({"update": 3, "score": 1.0, "text": "x"})
        trackers.close()
    assert sorted(service.kept) == [("loss", n) for n in (1, 2, 3, 4)] + [("score", 3)]
