"""A run's folder under faults: what is under a checkpoint's name is whole."""

import errno
import json
import sys

import pytest
import small_disk
import torch

from deit.training import runs
from deit.training.runs import RunFolder, State, load_state


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_no_checkpoint(folder, value):
    folder.save(state(1))
    with pytest.raises(ValueError, match=r"weights: NaN or infinity in 1 of 1 tensors, such as w;"):
        folder.save(state(2, value))
    assert [p.name for p in folder.checkpoints.iterdir()] == ["00000001"]


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


FULL = """
import sys
from pathlib import Path
import torch
from deit.training.runs import RunFolder, State, load_state, write_atomically

root = Path(sys.argv[1])
folder = RunFolder(root / "run")
folder.begin({"arch": "x"})
folder.log(update=1, loss=0.5)
state = lambda update, size: State(
    update, {"w": torch.ones(size)}, None, {"optimizer": torch.ones(size)}
)
folder.save(state(1, 1000))

def refused(write):
    try:
        write()
    except OSError as error:
        print(error)
    else:
        sys.exit("nothing was refused")

for size in (900_000, 500_000):  # no room for the weights; room for them but not for the rest
    refused(lambda: folder.save(state(2, size)))
with open(root / "filler", "wb", buffering=0) as file:
    refused(lambda: [None for _ in iter(lambda: file.write(b"x" * 4096), 0)])
refused(lambda: folder.save(state(2, 10)))
refused(lambda: write_atomically(root / "run" / "run.json", "y" * 10_000))
refused(lambda: [folder.log(update=2, loss=0.25) for _ in range(1000)])  # to the page's end
entries = folder.entries()
assert entries[-1] in ({"update": 2, "loss": 0.25}, {"update": 1, "loss": 0.5}), entries[-1]
found = sorted(str(p.relative_to(folder.root)) for p in folder.root.rglob("*"))
assert found == [
    "checkpoints", "checkpoints/00000001", "checkpoints/00000001/manifest.json",
    "checkpoints/00000001/model.safetensors", "checkpoints/00000001/training.pt",
    "log.jsonl", "run.json",
], found
assert load_state(folder.newest(sys.exit)).update == 1
(root / "filler").unlink()
folder.log(update=2, loss=0.25)
assert folder.entries()[-1] == {"update": 2, "loss": 0.25}
folder.save(state(2, 10))
assert load_state(folder.newest(sys.exit)).update == 2
"""


@pytest.mark.skipif(bool(small_disk.why_not()), reason=small_disk.why_not())
def test_a_disk_that_is_really_full_loses_nothing_that_was_there(tmp_path):
    script = 'exec "$1" -c "$2" "$0"'
    done = small_disk.run(tmp_path / "disk", "3m", script, sys.executable, FULL)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert all("No space left on device" in line for line in said), said
    named = ["model.safetensors", "00000002", None, "00000002", "run.json", "log.jsonl"]
    for line, name in zip(said, named, strict=True):
        assert name is None or name in line, line


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


def test_the_log_keeps_what_was_said_before_the_checkpoint_and_no_more(folder):
    folder.log(update=0, teacher=1)
    folder.log(update=1, unreadable="a.png")  # while the second update is made
    folder.log(update=2, loss=0.5)
    folder.log(update=2, model={})
    folder.log(update=2, unreadable="b.png")  # while the third is made
    folder.log(update=2, skipped="nan")
    folder.log(update=3, loss=0.4)
    said = folder.entries()
    assert folder.entries(2) == said[:4]
    folder.rewind(2)
    assert folder.entries() == said[:4]
    folder.rewind(None)
    assert folder.entries() == []
    for rest in (b'{"update": 9, "x": "', b"\0" * 90, b"\xff\x0c\xe2\x80\xa8{}\x85"):  # of a crash
        folder.log(update=1)
        with open(folder.root / "log.jsonl", "ab") as file:
            file.write(rest)
        assert folder.entries(1) == [{"update": 1}]
        folder.rewind(0)


def test_a_new_checkpoint_outlives_damaged_ones_after_it(folder):
    for update in (9, 8, 7):
        (folder.checkpoints / f"{update:08d}").mkdir()
    (folder.checkpoints / "100000000").mkdir()
    folder.save(state(3))
    folder.save(state(5))
    assert [path.name for path in folder._all()] == ["00000005", "00000003"]
    (folder.checkpoints / "100000000").mkdir()
    assert folder._all()[0].name == "100000000"  # newer than any of eight digits


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"update": "3"}', "update: expected a whole number from 0 .*; got '3'"),
        ('{"update": -1}', "update: expected a whole number from 0 .*; got -1"),
        ("[1]", "line 1 is damaged"),
        ('{"update": 1, "loss": ' + "[" * 500, "line 1 is damaged"),
    ],
)
def test_a_log_of_something_else(folder, line, message):
    (folder.root / "log.jsonl").write_text(f'{line}\n{{"update": 2}}\n')
    with pytest.raises(ValueError, match=rf"log\.jsonl: .*{message}"):
        folder.entries()


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[" * 1000, '{"sha256": []}', '{"sha256": {"../../run.json": "0"}}',
     '{"sha256": {"model.safetensors": 3}}'],
)  # fmt: skip
def test_a_manifest_of_something_else(folder, text):
    path = folder.save(state(1))
    (path / "manifest.json").write_text(text)
    assert "expected" in runs.damage(path)
    assert folder.newest(lambda _: None) is None
