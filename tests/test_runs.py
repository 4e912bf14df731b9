"""A run's folder under faults: what is under a checkpoint's name is whole."""

import errno
import json

import pytest
import torch

from deit import runs
from deit.runs import RunFolder, State, load_state


def state(update, value=1.0):
    tensor = torch.full((8,), value)
    return State(update, {"w": tensor}, {"w": tensor * 2}, {"optimizer": {"step": update}})


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run", keep=3)
    made.begin({"arch": "x"})
    return made


def test_what_was_saved_comes_back(folder):
    folder.save(state(7))
    found = load_state(folder.newest(print))
    assert found.update == 7
    assert torch.equal(found.model["w"], torch.ones(8))
    assert torch.equal(found.average["w"], torch.full((8,), 2.0))
    assert found.rest == {"optimizer": {"step": 7}}


def test_only_the_newest_are_kept(folder):
    for update in range(1, 6):
        folder.save(state(update))
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == [
        "00000003",
        "00000004",
        "00000005",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "manifest.json"])
@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_message(folder, name, fault):
    folder.save(state(1))
    path = folder.save(state(2)) / name
    data = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(
            {"truncated": data[: len(data) // 2], "flipped": flipped, "empty": b""}[fault]
        )
    said = []
    found = folder.newest(said.append)
    assert found.name == "00000001"
    assert "00000002 is passed over" in said[0]


def test_a_crash_while_writing_leaves_the_one_before(folder, monkeypatch):
    folder.save(state(1))

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        folder.save(state(2))
    assert [p.name for p in folder.checkpoints.iterdir()] == ["00000001"]


def test_a_full_disk_is_an_oserror_and_nothing_is_left_behind(folder, monkeypatch):
    folder.save(state(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(state(2))
    assert [p.name for p in folder.checkpoints.iterdir()] == ["00000001"]


def test_leftovers_of_a_killed_process_are_no_checkpoint(folder):
    folder.save(state(1))
    (folder.checkpoints / ".00000002.123.tmp").mkdir()
    assert folder.newest(print).name == "00000001"


def test_the_log_is_rewound_to_the_checkpoint(folder):
    for update in (1, 2, 3):
        folder.log(update=update, loss=0.5)
    with open(folder.root / "log.jsonl", "a") as file:
        file.write('{"update": 4, "lo')  # cut short by a crash
    folder.rewind(2)
    assert [entry["update"] for entry in folder.entries()] == [1, 2]
    (folder.root / "log.jsonl").write_text('{"update"\n{"update": 2}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        folder.entries()


def test_a_checkpoint_runs_no_code(folder, tmp_path):
    path = folder.save(state(1))

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    torch.save({"optimizer": Bomb()}, path / "training.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["training.pt"] = runs._sha256(path / "training.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"Unsupported|weights_only|WeightsUnpickler"):
        load_state(folder.newest(print))
    assert not (tmp_path / "boom").exists()
