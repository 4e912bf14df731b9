"""Whole runs, whole ones and interrupted ones."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training

from deit import load
from deit import train as train_module
from deit.cli import main
from deit.data.loader import WorkerDied
from deit.data.sources import Folder
from deit.recipes import recipe
from deit.train import NotFinite, TooManyUnreadable, Trainer, train

PROGRAM = [sys.executable, str(Path(training.__file__))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return training.images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    result = train(training.options(data, out))
    return out, result


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(left, right):
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def losses(text):
    return {int(u): float(x) for u, x in re.findall(r"update (\d+) loss (\S+)", text)}


def test_a_run_reports_and_keeps_what_it_did(whole):
    out, result = whole
    assert result["finished"]
    assert result["update"] == 9
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["update"] for e in entries if "model" in e] == [3, 6, 9]
    assert entries[-1]["model"]["images"] == 24
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["00000006", "00000009"]
    about = json.loads((out / "run.json").read_text())
    assert about["classes"] == ["blue", "green", "red"]
    assert about["options"]["recipe"]["mixup"] == 0.8


def test_the_same_seed_gives_the_same_weights_and_another_does_not(whole, data, tmp_path):
    train(training.options(data, tmp_path / "a", workers=2))
    assert same(training.weights(whole[0]), training.weights(tmp_path / "a")) == []
    train(training.options(data, tmp_path / "b", seed=1, recipe_epochs=1))
    assert same(training.weights(whole[0]), training.weights(tmp_path / "b"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on_to_the_same_weights(number, whole, data, tmp_path):
    out = tmp_path / "run"
    command = [*PROGRAM, str(data), str(out)]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DELAY": "0.3"},
    )
    for line in running.stdout:
        if "update 4 " in line:
            running.send_signal(number)
            break
    _, errors = running.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert running.returncode == 0, errors
        assert "stopped by a signal after update" in errors
    assert not (out / "model.safetensors").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    # SIGTERM saved where it stopped, SIGKILL falls back to the end of the epoch.
    first = min(losses(again.stdout))
    assert first == (3 if number == signal.SIGKILL else first)
    assert first >= 3
    assert same(training.weights(whole[0]), training.weights(out)) == []


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


def test_a_full_disk_does_not_end_the_run(data, tmp_path, monkeypatch, capfd):
    save, calls = train_module.RunFolder.save, []

    def full(self, state):
        calls.append(state.update)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return save(self, state)

    monkeypatch.setattr(train_module.RunFolder, "save", full)
    assert train(training.options(data, tmp_path))["finished"]
    assert "no checkpoint after update 3" in capfd.readouterr().err
    assert calls == [3, 6, 9]


def test_accumulated_parts_give_the_same_losses(data, tmp_path):
    plain = {"recipe_drop_path": 0.0, "recipe_epochs": 1}
    found = []
    for parts in (1, 4):
        out = tmp_path / str(parts)
        train(training.options(data, out, accumulate=parts, **plain))
        found.append(training.weights(out))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(parallel, data, tmp_path):
    changes = ["recipe_epochs=2", "recipe_drop_path=0"]
    one = subprocess.run(
        [*PROGRAM, str(data), str(tmp_path / "one"), *changes],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    two = subprocess.run(
        [*torchrun, PROGRAM[1], str(data), str(tmp_path / "two"), *changes, f"parallel={parallel}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr[-3000:]
    expected, found = losses(one.stdout), losses(two.stdout)
    assert expected.keys() == found.keys()
    assert len(expected) == 6
    for update, loss in expected.items():
        assert found[update] == pytest.approx(loss, rel=2e-5)
    ours = training.weights(tmp_path / "one")
    for name, tensor in training.weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-4, msg=name)


def test_one_process_takes_up_the_checkpoint_of_two(data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run(
        [*torchrun, PROGRAM[1], str(data), str(tmp_path), "recipe_epochs=1", "parallel=fsdp"],
        check=True,
        capture_output=True,
        timeout=300,
    )
    result = train(training.options(data, tmp_path, recipe_epochs=2))
    assert result["update"] == 6


def test_a_killed_process_is_restarted_by_torchrun(whole, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    changes = ["recipe_epochs=2", "recipe_drop_path=0"]
    for name, victim in (("calm", "-1,-1"), ("killed", "1,4")):
        done = subprocess.run(
            [*torchrun, "--max-restarts=3", PROGRAM[1], str(data), str(tmp_path / name), *changes],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "KILL": victim},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after update 3" in done.stderr
    calm, killed = (training.weights(tmp_path / name) for name in ("calm", "killed"))
    assert same(calm, killed) == []


def test_a_killed_worker_ends_the_run_with_a_message(data, tmp_path, monkeypatch):
    read = Folder.read

    def killed(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(Folder, "read", killed)
    with pytest.raises(WorkerDied, match=r"workers: DataLoader worker .*(killed|exited)"):
        train(training.options(data, tmp_path, workers=1, recipe_repeats=1))


def test_another_network_does_not_take_up_a_run(whole, data):
    with pytest.raises(ValueError, match="holds a run with img_size 16; got 32"):
        train(training.options(data, whole[0], img_size=32))


def test_distillation_with_a_token_reports_three_heads(whole, data, tmp_path, capfd):
    result = train(
        training.options(
            data, tmp_path, distill="hard", teacher=str(whole[0]), distilled=True, recipe_epochs=1
        )
    )
    assert list(result["model"]["top1"]) == ["class", "distillation", "softmax-sum"]
    assert "teacher: " in capfd.readouterr().err


def test_fine_tuning_at_a_higher_resolution(whole, data, tmp_path):
    result = train(
        training.options(data, tmp_path, weights=str(whole[0]), img_size=32, recipe_epochs=1)
    )
    assert result["finished"]
    found = training.weights(tmp_path)
    assert found["model.pos_embed"].shape == (1, 17, 64)


def test_fixres_changes_the_classifier_alone(whole, data, tmp_path):
    train(
        training.options(
            data,
            tmp_path,
            weights=str(whole[0]),
            train_only="classifier",
            recipe_crop="center",
            recipe_ema=None,
            recipe_epochs=1,
        )
    )
    before, after = training.weights(whole[0]), training.weights(tmp_path)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"model.head.weight", "model.head.bias"}


def test_deit3s_recipe_trains_our_network_with_layer_scale(data, tmp_path):
    short = recipe("deit3", epochs=2, batch_size=16, warmup_epochs=0.0)
    result = train(replace(training.options(data, tmp_path), recipe=short))
    assert result["finished"]
    model = load(tmp_path / "model.safetensors")
    assert model.config.layer_scale == 1e-4
    for block in model.blocks:
        for scale in (block.ls1, block.ls2):
            assert scale.gamma.isfinite().all()
            assert not torch.equal(scale.gamma, torch.full_like(scale.gamma, 1e-4))


def test_the_commands_run(data, whole, tmp_path, capsys):
    flags = (
        f"--data {data} --out {tmp_path / 'run'} --arch deit_ti --img-size 16 --embed-dim 64 "
        "--depth 1 --patch-size 8 --epochs 1 --batch-size 16 --ema None --workers 0 --device cpu"
    )
    assert main(["train", *flags.split()]) == 0
    assert (
        main(["eval", str(tmp_path / "run"), "--data", str(data), "--json", "--workers", "0"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["images"] == 24
    assert main(["train", *flags.split(), "--mixup", "-1"]) == 2
    assert "mixup: expected at least 0; got -1" in capsys.readouterr().err
