"""Runs of several processes."""

import json
import os
import signal
import subprocess

import pytest
import torch
import training
from training import PROGRAM, TORCHRUN, losses, same, signalled

pytestmark = pytest.mark.usefixtures("one_thread")


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
    two = subprocess.run(
        [*TORCHRUN, PROGRAM[1], str(data), str(tmp_path / "two"), *changes, f"parallel={parallel}"],
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


def test_any_number_of_processes_takes_up_a_checkpoint(data, tmp_path):
    # Two shard the weights and lose one; one goes on and is killed; two end it. Every process
    # has a folder of its own, as nodes without a common disk do: the first one's counts.
    expected: dict[int, float] = {}
    for name, starts in (
        ("whole", [(PROGRAM, "parallel=ddp", "-1,-1")]),
        (
            "node-RANK",
            [
                ([*TORCHRUN, PROGRAM[1]], "parallel=fsdp", "1,4"),
                (PROGRAM, "parallel=ddp", "0,7"),
                ([*TORCHRUN, PROGRAM[1]], "parallel=fsdp", "-1,-1"),
            ],
        ),
    ):
        found: dict[int, float] = {}
        for command, parallel, victim in starts:
            done = subprocess.run(
                [*command, str(data), str(tmp_path / name), "recipe_drop_path=0", parallel],
                capture_output=True,
                text=True,
                timeout=300,
                env=os.environ | {"OMP_NUM_THREADS": "1", "KILL": victim},
            )
            assert (done.returncode == 0) == (victim == "-1,-1"), done.stderr[-3000:]
            found |= losses(done.stdout)
        expected = expected or found
    assert min(losses(done.stdout)) == 6
    assert not (tmp_path / "node-1" / "checkpoints").exists()
    assert found == pytest.approx(expected, rel=2e-5)
    whole = training.weights(tmp_path / "whole")
    for name, tensor in training.weights(tmp_path / "node-0").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-4, msg=name)


def test_a_killed_process_is_restarted_by_torchrun(whole, data, tmp_path):
    changes = ["recipe_epochs=2", "recipe_drop_path=0"]
    for name, victim in (("calm", "-1,-1"), ("killed", "1,4")):
        done = subprocess.run(
            [*TORCHRUN, "--max-restarts=3", PROGRAM[1], str(data), str(tmp_path / name), *changes],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "KILL": victim},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after update 3" in done.stderr
    calm, killed = (training.weights(tmp_path / name) for name in ("calm", "killed"))
    assert same(calm, killed) == []


def test_a_signal_to_one_process_ends_the_evaluation_of_both(tmp_path):
    many = training.images(tmp_path / "data", val=32)  # 6 batches of each process
    out = tmp_path / "run"
    command = [*TORCHRUN, PROGRAM[1], str(many), str(out), "recipe_epochs=2"]
    status, after, errors = signalled(
        command,
        signal.SIGTERM,
        at=r"^evaluating in process (\d+)",
        EVALUATION="1",
        OMP_NUM_THREADS="1",
    )
    assert status == 0, errors[-3000:]
    assert "stopped by a signal after update 3" in errors
    assert after.count("evaluating") < 12  # of 24: two processes, the network and its average
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000003"]
    again = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert min(losses(again.stdout)) == 3
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in entries if "model" in entry] == [3, 6]
