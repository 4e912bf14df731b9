"""Interrupted runs: signals, full disks, broken files, NaN, lost workers."""

import itertools
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import small_disk
import torch
import training
from training import PROGRAM, losses, run, same

from deit.data.loader import WorkerDied
from deit.data.sources import Folder
from deit.training.trainer import NotFinite, TooManyUnreadable, Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("number", "status", "kept"), [(signal.SIGTERM, 0, 5), (signal.SIGKILL, -signal.SIGKILL, 3)]
)
def test_a_killed_run_goes_on_to_the_same_weights(number, status, kept, whole, data, tmp_path):
    out = tmp_path / "run"
    command = [*PROGRAM, str(data), str(out)]
    _, errors = run(command, status=status, send=number, at="^update 3 ")
    # SIGTERM saves after the next update. SIGKILL falls back to the end of the epoch.
    assert ("stopped by a signal after update 5" in errors) == (number == signal.SIGTERM)
    assert not (out / "model.safetensors").exists()
    again, _ = run(command)
    assert min(losses(again)) == kept
    assert same(training.weights(whole[0]), training.weights(out)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_in_another_thread_is_the_same_run(workers, whole, data, tmp_path):
    """A notebook or a service trains so: Python sets no signal handler outside the main thread."""
    results = []
    before = signal.getsignal(signal.SIGTERM)
    options = training.options(data, tmp_path, workers=workers)
    thread = threading.Thread(target=lambda: results.append(train(options)))
    thread.start()
    thread.join()
    assert results
    assert results[0]["finished"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert same(training.weights(whole[0]), training.weights(tmp_path)) == []


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(whole, data, tmp_path, capfd):
    out = tmp_path / "run"
    train(training.options(data, out))
    newest = out / "checkpoints" / "00000009" / "training.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    train(training.options(data, out))
    assert "00000009 is passed over" in capfd.readouterr().err
    assert same(training.weights(whole[0]), training.weights(out)) == []


def poisoned(monkeypatch, at):
    step = Trainer._loss

    def loss(self, batch):
        value = step(self, batch)
        return value * float("nan") if self.update == at else value

    monkeypatch.setattr(Trainer, "_loss", loss)


def test_a_nan_loss_stops_with_its_images_named(data, tmp_path, monkeypatch):
    poisoned(monkeypatch, at=4)
    with pytest.raises(NotFinite, match=r"loss: nan at update 4; its images are named in .*json"):
        train(training.options(data, tmp_path))
    facts = json.loads((tmp_path / "not-finite-00000004-rank0.json").read_text())
    assert len(facts["images"]) == 16
    assert all(Path(name).exists() for name in facts["images"])


def test_a_nan_loss_may_be_skipped_by_name(data, tmp_path, monkeypatch):
    poisoned(monkeypatch, at=4)
    result = train(training.options(data, tmp_path, on_nan="skip"))
    assert result["finished"]
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["update"] for e in entries if "skipped" in e] == [4]
    facts = json.loads((tmp_path / "not-finite-00000004-rank0.json").read_text())
    assert len(facts["images"]) == 16
    assert all(w.isfinite().all() for w in training.weights(tmp_path).values())


def test_unreadable_images_are_counted_named_and_stop_the_run(tmp_path):
    broken = training.images(tmp_path / "data")
    for i in (3, 5):
        (broken / "train" / "red" / f"{i}.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(TooManyUnreadable, match=r"of 48 images could not be read.*red/\d.png"):
        train(training.options(broken, tmp_path / "out", recipe_repeats=1))
    out = tmp_path / "tolerant"
    assert train(training.options(broken, out, max_unreadable=0.1, recipe_repeats=1))["finished"]
    named = [e for e in map(json.loads, (out / "log.jsonl").open()) if "unreadable" in e]
    assert sorted(Path(e["unreadable"]).name for e in named) == ["3.png", "5.png"]


def test_a_killed_worker_ends_the_run_with_a_message(data, tmp_path, monkeypatch):
    read = Folder.read

    def killed(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(Folder, "read", killed)
    with pytest.raises(WorkerDied, match=r"workers: DataLoader worker .*(killed|exited)"):
        train(training.options(data, tmp_path, workers=1, recipe_repeats=1))


def test_a_worker_killed_while_the_network_computes_is_named_too(data, tmp_path, monkeypatch):
    read, reads = Folder.read, itertools.count()

    def killed(self, index):
        if torch.utils.data.get_worker_info() is not None and next(reads) == 16:
            time.sleep(1.0)  # the first batch is on its way
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    def slow(self, batch):
        time.sleep(60)  # the death of a child ends it
        pytest.fail("the network's step ended before the worker did")

    monkeypatch.setattr(Folder, "read", killed)
    monkeypatch.setattr(Trainer, "_loss", slow)
    with pytest.raises(WorkerDied, match=r"workers: DataLoader worker .*(killed|exited)"):
        train(training.options(data, tmp_path, workers=1, recipe_repeats=1))
    subprocess.run(["true"], check=True)  # another child's end: torch has forgotten the worker


def test_a_worker_killed_while_it_hands_over_a_batch_is_named_too(data, tmp_path, monkeypatch):
    def reset(self):
        raise ConnectionResetError(104, "Connection reset by peer")

    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator, "_next_data", reset)
    with pytest.raises(WorkerDied, match="workers: DataLoader worker exited within a batch: Conn"):
        train(training.options(data, tmp_path, workers=1, recipe_repeats=1))


def test_another_network_does_not_take_up_a_run(whole, data):
    with pytest.raises(ValueError, match="holds a run with img_size 16; got 32"):
        train(training.options(data, whole[0], img_size=32))


def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes(whole, tmp_path):
    many = training.images(tmp_path / "data", val=32)  # 6 batches, of the network and its average
    out = tmp_path / "run"
    command = [*PROGRAM, str(many), str(out)]
    lines, errors = run(command, send=signal.SIGTERM, at="^evaluating")
    assert "stopped by a signal after update 3" in errors
    assert lines.count("evaluating") == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000003"]
    again, _ = run(command)
    assert min(losses(again)) == 3
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in entries if "model" in entry] == [3, 6, 9]
    assert same(training.weights(whole[0]), training.weights(out)) == []


# A checkpoint of the small run is 1.8 MB, its final weights are twice 0.5 MB: 2 MB hold one
# checkpoint and nothing else.
FULL = """
"$@"; echo "exit $?"
ls -A "$0" "$0"/run "$0"/run/checkpoints
mount -o remount,size=16m "$0"
"$@"; echo "exit $?"
cp -r "$0"/run "$KEPT"
"""


@pytest.mark.skipif(bool(small_disk.why_not()), reason=small_disk.why_not())
def test_a_full_disk_costs_checkpoints_and_not_the_run(whole, data, tmp_path, monkeypatch):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    monkeypatch.setenv("KEPT", str(kept))
    done = small_disk.run(disk, "2m", FULL, *PROGRAM, str(data), str(disk / "run"))
    for update in (6, 9):
        assert f"no checkpoint after update {update}: [Errno 28] No space left" in done.stderr
    assert f"OSError: [Errno 28] No space left on device: '{disk}/run/model.saf" in done.stderr
    before, after = done.stdout.split("exit 1\n")
    assert max(losses(before)) == 8  # it trained to its end
    listing = set(after.split("update")[0].split())
    parts = {f"{disk}:", f"{disk}/run:", f"{disk}/run/checkpoints:", "run", "checkpoints"}
    assert listing - parts == {"00000003", "log.jsonl", "run.json", "verdicts.json"}
    assert "going on after update 3" in done.stderr
    assert after.endswith("exit 0\n"), done.stderr
    assert same(training.weights(whole[0]), training.weights(kept)) == []
