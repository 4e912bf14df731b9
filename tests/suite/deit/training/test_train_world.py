"""Runs of several processes."""

import json
import signal

import pytest
import torch
import training
from training import PROGRAM, TORCHRUN, losses, run, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(parallel, data, tmp_path):
    changes = ["recipe_epochs=2", "recipe_drop_path=0"]
    one, _ = run([*PROGRAM, str(data), str(tmp_path / "one"), *changes])
    out = str(tmp_path / "two")
    two, _ = run([*TORCHRUN, PROGRAM[1], str(data), out, *changes, f"parallel={parallel}"])
    expected, found = losses(one), losses(two)
    assert expected.keys() == found.keys()
    assert len(expected) == 6
    for update, loss in expected.items():
        assert found[update] == pytest.approx(loss, rel=2e-5)
    ours = training.weights(tmp_path / "one")
    for name, tensor in training.weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-4, msg=name)


def test_any_number_of_processes_takes_up_a_checkpoint(data, tmp_path):
    # Two processes shard the weights and lose one; one goes on and is killed; two end the run.
    # Every process has a folder of its own, as nodes without a common disk do. The first one's
    # counts.
    expected: dict[int, float] = {}
    for name, starts in (
        ("whole", [(PROGRAM, "parallel=ddp", "-1,-1", 0)]),
        (
            "node-RANK",
            [
                ([*TORCHRUN, PROGRAM[1]], "parallel=fsdp", "1,4", 1),
                (PROGRAM, "parallel=ddp", "0,7", -signal.SIGKILL),
                ([*TORCHRUN, PROGRAM[1]], "parallel=fsdp", "-1,-1", 0),
            ],
        ),
    ):
        found: dict[int, float] = {}
        for command, parallel, victim, status in starts:
            out, _ = run(
                [*command, str(data), str(tmp_path / name), "recipe_drop_path=0", parallel],
                status=status,
                KILL=victim,
            )
            found |= losses(out)
        expected = expected or found
    assert min(losses(out)) == 6
    assert not (tmp_path / "node-1" / "checkpoints").exists()
    assert found == pytest.approx(expected, rel=2e-5)
    whole = training.weights(tmp_path / "whole")
    for name, tensor in training.weights(tmp_path / "node-0").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-4, msg=name)


def test_a_killed_process_is_restarted_by_torchrun(data, tmp_path):
    changes = ["recipe_epochs=2", "recipe_drop_path=0"]
    command = [*TORCHRUN, "--max-restarts=1", PROGRAM[1], str(data)]
    run([*command, str(tmp_path / "calm"), *changes])
    _, errors = run([*command, str(tmp_path / "killed"), *changes], KILL="1,4", LATE="1")
    assert "going on after update 3" in errors
    calm, killed = (training.weights(tmp_path / name) for name in ("calm", "killed"))
    assert same(calm, killed) == []


def test_a_signal_to_one_process_ends_the_evaluation_of_both(tmp_path):
    many = training.images(tmp_path / "data", val=32)  # 6 batches of each process
    out = tmp_path / "run"
    command = [*TORCHRUN, PROGRAM[1], str(many), str(out), "recipe_epochs=2"]
    lines, errors = run(command, send=signal.SIGTERM, at=r"^evaluating, process 1 is (\d+)")
    assert "stopped by a signal after update 3" in errors
    assert lines.count("evaluating") == 2  # of 24: two processes, the network and its average
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000003"]
    again, _ = run(command)
    assert min(losses(again)) == 3
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in entries if "model" in entry] == [3, 6]
