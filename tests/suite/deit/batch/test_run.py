"""Collections into Parquet: every row once, the same bits, whatever happens on the way."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import collection
import numpy as np
import pytest
import small_disk
import torch

from deit.batch import Inputs, Model, pieces, run
from deit.batch.decoding import Plan
from deit.batch.run import _Pace
from deit.commands.cli import main
from deit.training.progress import Watch

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
pa = pytest.importorskip("pyarrow")

COUNT = 42
BAD = (5, 17)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return collection.weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return collection.folder(tmp_path_factory.mktemp("photos"), COUNT, bad=BAD)


@pytest.fixture(scope="module")
def model(weights):
    return Model(weights, output="embedding", batch_size=4)


@pytest.fixture(scope="module")
def whole(model, photos, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    summary = run(model, Inputs([photos]), out, rows=8, workers=0)
    return out, summary


def test_a_row_for_every_image(whole, model, photos):
    out, summary = whole
    assert (summary.rows, summary.unreadable, summary.made) == (COUNT, len(BAD), COUNT)
    rows = collection.rows(out)
    assert [row["path"] for row in rows] == [item.name for item in Inputs([photos])]
    for row in rows:
        number = int(row["path"][-8:-4])
        if number in BAD:
            assert row["embedding"] is None
            assert row["error"]
        else:
            assert row["error"] is None
            np.testing.assert_allclose(
                row["embedding"], model([row["path"]])[0], rtol=1e-4, atol=1e-5
            )
    table = pq.read_table(out)
    assert table.num_rows == COUNT  # readers pass over _run.json and .lock
    assert table.schema.field("embedding").type == pa.list_(pa.float32())  # any pyarrow's null


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_bit(whole, model, photos, tmp_path, workers):
    run(model, Inputs([photos]), tmp_path, rows=8, workers=workers)
    assert collection.same_bytes(tmp_path) == collection.same_bytes(whole[0])


def test_pieces_that_are_missing_are_made_and_no_others(whole, model, photos, tmp_path):
    run(model, Inputs([photos]), tmp_path, rows=8, workers=0)
    kept = tmp_path / "piece-000001.parquet"
    before = kept.stat().st_mtime_ns
    for number in (0, 3, 5):
        (tmp_path / f"piece-00000{number}.parquet").unlink()
    (tmp_path / ".piece-000003.parquet.77.tmp").write_bytes(b"of a process that was killed")
    summary = run(model, Inputs([photos]), tmp_path, rows=8, workers=0)
    assert summary.made == 8 + 8 + 2
    assert (summary.rows, summary.unreadable) == (COUNT, len(BAD))
    assert collection.same_bytes(tmp_path) == collection.same_bytes(whole[0])
    assert kept.stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*.tmp"))
    assert run(model, Inputs([photos]), tmp_path, rows=8).made == 0


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(whole, weights, photos, tmp_path):
    """SIGKILL, again and again, each time a little later; workers go with it."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "deit", "embed", str(photos), "--weights", str(weights),
               "--out", str(out), "--rows", "8", "--batch-size", "4", "--workers", "2"]  # fmt: skip
    killed = 0
    for target in (1, 3):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(list(out.glob("piece-*"))) < target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        rows = collection.rows(out)  # what is there is whole
        assert len(rows) == len({row["path"] for row in rows}) >= 8 * (target - 1)
    assert killed
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # two images are unreadable
    assert collection.same_bytes(out) == collection.same_bytes(whole[0])
    assert not list(out.glob(".piece*"))


def test_a_worker_that_is_killed_ends_the_run_by_name(model, photos, tmp_path, monkeypatch):
    from deit.batch import decoding
    from deit.data.loader import WorkerDied

    def die(self, task):
        if task.piece == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, task)

    read = decoding._Decoding.__getitem__
    monkeypatch.setattr(decoding._Decoding, "__getitem__", die)
    # torch sees the death, or that the pipe is shut, whichever comes first
    with pytest.raises(WorkerDied, match=r"workers: DataLoader worker .*(killed|exited)"):
        run(model, Inputs([photos]), tmp_path, rows=8, workers=1)
    monkeypatch.undo()
    assert run(model, Inputs([photos]), tmp_path, rows=8, workers=0).rows == COUNT


def test_shards_give_what_their_files_give(model, tmp_path):
    images = collection.encoded(10)
    for number in range(2):
        collection.shard(tmp_path / f"{number}.tar", images[number * 5 : number * 5 + 5])
    run(model, Inputs([f"{tmp_path}/{{0..1}}.tar"]), tmp_path / "out", rows=4, workers=1)
    rows = collection.rows(tmp_path / "out")
    assert [row["path"] for row in rows][4:6] == [
        f"{tmp_path}/0.tar:0004.jpg",
        f"{tmp_path}/1.tar:0000.jpg",
    ]
    found = np.array([row["embedding"] for row in rows])
    np.testing.assert_allclose(found, model(images), rtol=1e-4, atol=1e-5)


def test_a_shard_cut_short_ends_the_run_and_mended_it_goes_on(model, tmp_path):
    images = collection.encoded(12)
    for number in range(3):
        collection.shard(tmp_path / f"{number}.tar", images[number * 4 : number * 4 + 4])
    whole = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[:5000])
    inputs = Inputs([f"{tmp_path}/{{0..2}}.tar"])
    with pytest.raises(ValueError, match=r"2\.tar: cut short"):
        run(model, inputs, tmp_path / "out", rows=4, workers=0)
    assert len(collection.rows(tmp_path / "out")) == 8
    (tmp_path / "2.tar").write_bytes(whole)
    assert run(model, inputs, tmp_path / "out", rows=4, workers=0).made == 4


def test_options_that_changed_are_refused(whole, weights, model, photos):
    out, _ = whole
    before = collection.same_bytes(out)
    for how, message in (
        ({"rows": 16}, "rows was 8 and is 16"),
        ({"rows": 8, "model": Model(weights, batch_size=4)}, "output was 'embedding' and is"),
        ({"rows": 8, "inputs": Inputs([photos / "0"])}, "images was"),
        ({"rows": 8, "model": Model(weights, output="embedding", batch_size=4, decode="fast")},
         "decode was 'exact' and is 'fast'"),
    ):  # fmt: skip
        how = {"model": model, "inputs": Inputs([photos]), **how}
        with pytest.raises(ValueError, match=f"out: .*asked for something else .*{message}"):
            run(how["model"], how["inputs"], out, rows=how["rows"])
    assert collection.same_bytes(out) == before


def test_another_number_of_threads_is_refused(model, photos, tmp_path, threads):
    """Sums are split by threads, so that bits depend on them."""
    before = torch.get_num_threads()
    run(model, Inputs([photos / "0"]), tmp_path, rows=4, workers=0)
    threads(before + 1)
    with pytest.raises(ValueError, match=f"threads was {before} and is {before + 1}"):
        run(model, Inputs([photos / "0"]), tmp_path, rows=4, workers=0)


def test_other_weights_under_the_same_name_are_refused(tmp_path, photos):
    import small

    from deit.weights.checkpoint import save

    path = tmp_path / "w.safetensors"
    for seed in (0, 1):
        save(small.network(seed=seed), path)
        model = Model(path, batch_size=4)
        if seed == 0:
            run(model, Inputs([photos]), tmp_path / "out", rows=8, workers=0)
    with pytest.raises(ValueError, match="weights was"):
        run(model, Inputs([photos]), tmp_path / "out", rows=8, workers=0)


def test_a_collection_that_changed_is_refused(model, tmp_path):
    photos = collection.folder(tmp_path / "photos", 12)
    out = tmp_path / "out"
    run(model, Inputs([photos]), out, rows=4, workers=0)
    before = collection.same_bytes(out)
    moved = photos / "1" / "0004.jpg"
    moved.rename(photos / "1" / "0004b.jpg")
    with pytest.raises(ValueError, match="holds other images than are there now"):
        run(model, Inputs([photos]), out, rows=4, workers=0)
    (photos / "1" / "0004b.jpg").rename(moved)
    (photos / "2" / "more.jpg").write_bytes(moved.read_bytes())
    assert (
        run(model, Inputs([photos]), out, rows=4, workers=0).rows == 13
    )  # it only grew, by a piece
    for extra in ("more.jpg",):
        (photos / "2" / extra).unlink()
    with pytest.raises(ValueError, match="beyond the collection's end"):
        run(model, Inputs([photos]), out, rows=4, workers=0)
    assert {name: data for name, data in collection.same_bytes(out).items() if name in before} == (
        before
    )


def test_the_same_names_in_another_folder_are_refused(model, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for place in ("a", "b"):
        collection.folder(tmp_path / place / "photos", 8)
    monkeypatch.chdir(tmp_path / "a")
    run(model, Inputs(["photos"]), out, rows=4, workers=0)
    (out / "piece-000001.parquet").unlink()
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ValueError, match=r"relative_to was '.* and is '"):
        run(model, Inputs(["photos"]), out, rows=4, workers=0)
    monkeypatch.chdir(tmp_path / "a")
    assert run(model, Inputs(["photos"]), out, rows=4, workers=0).made == 4


def test_an_output_folder_within_a_glob_is_refused(model, photos, tmp_path):
    collection.folder(tmp_path / "photos", 4)
    with pytest.raises(ValueError, match=r"\*\* takes in what is written"):
        run(model, Inputs([f"{tmp_path}/photos/**"]), tmp_path / "photos" / "out", workers=0)
    assert not (tmp_path / "photos" / "out").exists()
    within = run(model, Inputs([tmp_path / "photos"]), tmp_path / "photos" / "out", workers=0)
    assert within.rows == 4
    assert run(model, Inputs([tmp_path / "photos"]), tmp_path / "photos" / "out").made == 0


def test_folders_that_are_not_of_a_run(model, photos, tmp_path):
    def refused(out, message):
        before = sorted((p.name, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
        with pytest.raises(ValueError, match=message):
            run(model, Inputs([photos]), out, rows=8, workers=0)
        after = sorted((p.name, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
        assert after == before

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"precious")
    refused(tmp_path / "a", "out: expected an empty folder .* has model.safetensors and no _run")
    (tmp_path / "file").write_bytes(b"precious")
    refused(tmp_path / "file", "out: expected a folder")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / pieces.ABOUT).write_text('{"kind": "another"}')
    (tmp_path / "b" / pieces.LOCK).touch()
    refused(tmp_path / "b", "is not of a run like this one")
    (tmp_path / "b" / pieces.ABOUT).write_text("{")
    refused(tmp_path / "b", "expected JSON")


def test_a_piece_of_an_older_version_is_named(model, photos, tmp_path):
    """Its lists were of a fixed size: beside new ones nobody could read the folder as one table."""
    run(model, Inputs([photos]), tmp_path, rows=8, workers=0)
    piece = tmp_path / "piece-000002.parquet"
    table = pq.read_table(piece)
    index = next(i for i, field in enumerate(table.schema) if pa.types.is_list(field.type))
    field, width = table.schema.field(index), len(table.column(index)[0])
    flat = table.column(index).combine_chunks().flatten()
    old = pa.FixedSizeListArray.from_arrays(flat, width)
    pq.write_table(table.set_column(index, field.name, old), piece)
    with pytest.raises(ValueError, match="has lists of a fixed size, as an older version wrote"):
        run(model, Inputs([photos]), tmp_path, rows=8, workers=0)


def test_a_damaged_piece_is_named(model, photos, tmp_path):
    run(model, Inputs([photos]), tmp_path, rows=8, workers=0)
    path = tmp_path / "piece-000002.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"piece-000002\.parquet is damaged .*remove it"):
        run(model, Inputs([photos]), tmp_path, rows=8, workers=0)


FULL = """
"$3" - "$0" <<'PYTHON'
import os, sys
import numpy as np
from deit.batch.inputs import Item
from deit.batch.pieces import Pieces
out = sys.argv[1] + "/out"
pieces = Pieces(out, {})
items = [Item(str(n), str(n)) for n in range(1000)]
try:
    for number in range(9):  # of 0.4 MB each
        rows = np.random.default_rng(number).standard_normal((1000, 100), dtype=np.float32)
        pieces.write(number, items, [None] * 1000, {"embedding": rows})
except OSError as error:
    print(error.errno, error.filename)
pieces.close()
os.unlink(out + "/piece-000000.parquet")
again = Pieces(out, {})
print(sorted(again.there), [again.check(n, items) for n in again.there])
print([name for name in os.listdir(out) if name.endswith("tmp")])
PYTHON
"""


@pytest.mark.skipif(bool(small_disk.why_not()), reason=small_disk.why_not())
def test_a_full_disk_is_named_and_leaves_whole_pieces(tmp_path):
    done = small_disk.run(tmp_path / "disk", "2m", FULL, "-", "-", sys.executable)
    assert done.returncode == 0, done.stderr
    said, there, left = done.stdout.splitlines()
    assert said.startswith("28 ")
    assert said.endswith(".parquet")
    assert "piece-" in said
    assert there in ("[1, 2] [0, 0]", "[1, 2, 3] [0, 0, 0]")
    assert left == "[]"


def test_two_runs_do_not_share_a_folder(model, photos, tmp_path):
    code = (
        "import fcntl, sys; f = open(sys.argv[1] + '/.lock', 'ab');"
        "fcntl.lockf(f, fcntl.LOCK_EX); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(ValueError, match="another process is writing"):
            pieces.Pieces(tmp_path, {"a": 1})
        process.stdin.close()
    ours = pieces.Pieces(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="another run of this process is writing"):
        pieces.Pieces(tmp_path, {"a": 1})
    ours.close()
    pieces.Pieces(tmp_path, {"a": 1}).close()


def test_a_name_that_is_no_utf8(model, tmp_path):
    (tmp_path / "in").mkdir()
    path = os.fsencode(tmp_path / "in") + b"/a\xff.jpg"
    with open(path, "wb") as file:
        file.write(collection.encoded(1)[0])
    run(model, Inputs([tmp_path / "in"]), tmp_path / "out", rows=4, workers=1)
    (row,) = collection.rows(tmp_path / "out")
    assert row["path"].endswith("/a\\xff.jpg")
    assert row["error"] is None


def test_what_the_pace_says(model, photos, tmp_path):
    counts = {(COUNT, 0): "30 of 42 images", (2, 10): "30 of 52 images"}
    for counted, said in counts.items():
        inputs = Inputs([photos])
        inputs.count = lambda counted=counted: counted
        plan = Plan(inputs, None, rows=8, batch_size=4, there=10, unreadable=1)
        plan.shards, plan.in_shards = 2, 10
        pace = _Pace(plan, Watch(True, io.StringIO()), inputs)
        pace._count()
        start = pace.marks[0][0]
        pace.made, pace.unreadable = 20, 2
        pace.marks.append((start + 5.0, 20, 1.0))
        left = (42 if counted[1] == 0 else 52) - 30
        assert pace.line() == (
            f"{said}, 4.0/s, waiting for decoding 20 %, 3 unreadable, {round(left / 4)} s left"
        )


def test_progress_is_shown(model, photos, tmp_path):
    shown = io.StringIO()
    run(model, Inputs([photos]), tmp_path, rows=8, workers=0, watch=Watch(True, shown, every=0))
    assert "42 of 42 images" in " ".join(shown.getvalue().split())


def test_numbers(model, weights, photos, tmp_path):
    for how, message in (
        ({"rows": 6}, "rows: expected a multiple of the batch size, 4; got 6"),
        ({"rows": 0}, "rows: expected a multiple"),
        ({"workers": -1}, "workers: expected at least 0"),
        ({"topk": 3}, "topk: expected a model of probabilities; got one of embedding"),
        ({"topk": 8, "model": Model(weights, output="probabilities")}, "topk: expected 1 to 7"),
    ):
        with pytest.raises(ValueError, match=message):
            run(how.pop("model", model), Inputs([photos]), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_without_pyarrow_it_says_what_to_install(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fused-deit\[scale\]'"):
        run(model, Inputs([photos]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands(weights, photos, tmp_path, capsys):
    how = ["--weights", str(weights), "--batch-size", "4", "--rows", "8"]
    out = tmp_path / "out"
    code = main(["predict", str(photos), "--out", str(out), "--topk", "3", *how])
    said = capsys.readouterr().err
    assert code == 1
    assert "42 rows in" in said
    assert "% of the time waiting for decoding" in said
    assert "2 could not be read" in said
    rows = collection.rows(out)
    assert list(rows[0]) == ["path", "class", "score", "error"]
    probabilities = Model(weights, output="probabilities", batch_size=4)
    row = rows[3]
    values = probabilities([row["path"]])[0]
    assert row["class"] == list(np.argsort(-values)[:3])
    np.testing.assert_allclose(row["score"], np.sort(values)[::-1][:3], rtol=1e-4)
    eight = ["--dtype", "int8", "--threads", str(torch.get_num_threads())]
    assert main(["predict", str(photos), "--out", str(tmp_path / "8"), *eight, *how]) == 1
    assert collection.rows(tmp_path / "8")[3]["class"][0] == row["class"][0]
    assert main(["embed", str(photos / "*" / "*.jpg"), "--out", str(tmp_path / "e"), *how]) == 1
    assert "embedding" in collection.rows(tmp_path / "e")[0]
    assert main(["embed", str(photos), *how]) == 2
    assert "--out: expected a path; got none" in capsys.readouterr().err
    assert main(["embed", str(tmp_path / "*.gif"), "--out", str(tmp_path / "f"), *how]) == 2
    assert "nothing matches" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
    assert main(["predict", str(photos), "--rows", "8", "--weights", str(weights)]) == 2
    assert "they go with --out" in capsys.readouterr().err
