"""Labelled images: sources, augmentation by counters, mixing."""
# ruff: noqa: NPY002 (the augmentation libraries draw from the global generator)

import functools
import gzip
import http.server
import io
import random
import struct
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from deit.data.augment import evaluation_transform, mix, seeded, training_transform
from deit.data.loader import Loader, in_order
from deit.data.sampling import Batches, Draw, Plan
from deit.data.sources import FashionMnist, Folder, open_source
from deit.recipes import recipe

STATS = ((0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 8 and 4 images, in train and val."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in (("cat", 8), ("dog", 4)):
            inside = tmp_path / split / name
            inside.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(inside / f"{i}.png")
    return tmp_path


def idx(path, array, compress):
    data = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_files(tmp_path, compress):
    images = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
    labels = np.array([9, 0, 4], np.uint8)
    idx(tmp_path / "train-images-idx3-ubyte", images, compress)
    idx(tmp_path / "train-labels-idx1-ubyte", labels, compress)
    source = open_source(f"fashion-mnist:{tmp_path}", "train")
    image, label = source.read(2)
    assert (len(source), label, source.classes[4]) == (3, 4, "Coat")
    assert np.array_equal(np.asarray(image), images[2][:, :, None].repeat(3, axis=2))


def test_damaged_or_missing_idx_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no Fashion-MNIST in .* install the Debian package"):
        open_source(f"fashion-mnist:{tmp_path}", "train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x05")
    with pytest.raises(ValueError, match="damaged"):
        FashionMnist.open(tmp_path, "train")


def test_folder_classes_come_from_training(folder):
    train = open_source(str(folder), "train")
    assert train.classes == ("cat", "dog")
    assert [train.read(i)[1] for i in range(12)] == [0] * 8 + [1] * 4
    (folder / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match="classes that training has not: \\['emu'\\]"):
        Folder.open(folder / "val", train.classes)
    with pytest.raises(ValueError, match="expected a folder with one folder a class"):
        open_source(str(folder / "nowhere"), "train")


def test_a_limit_keeps_the_shares_of_classes(folder):
    part = open_source(str(folder), "train", limit=6)
    assert [part.read(i)[1] for i in range(6)] == [0, 0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="limit: expected at least 1"):
        open_source(str(folder), "train", limit=0)


@pytest.mark.parametrize("name", ["deit", "deit3", "fashion-mnist", "fixres"])
def test_samples_are_the_same_for_any_number_of_workers(folder, name):
    source = open_source(str(folder), "train")
    transform = training_transform(recipe(name), 16, *STATS)
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers)  # what the process drew before must not matter
        random.seed(workers)
        np.random.seed(workers)
        batches = Batches(Plan(12, 4, views=2, seed=7), 2)
        loader = Loader(
            source, transform, batches, seed=7, workers=workers, device=torch.device("cpu")
        )
        runs.append([(b.images, b.labels, b.draws) for b in loader])
    for (x, y, draws), (other_x, other_y, other_draws) in zip(*runs, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
        assert draws == other_draws


def test_views_and_epochs_of_an_image_differ(folder):
    source = open_source(str(folder), "train")
    transform = training_transform(recipe("deit"), 16, *STATS)
    draws = [Draw(0, 0, 0, 3, 0), Draw(0, 1, 0, 3, 1), Draw(9, 0, 1, 3, 0), Draw(0, 0, 0, 3, 0)]
    loader = Loader(source, transform, [draws], seed=1, workers=0, device=torch.device("cpu"))
    one, view, epoch, again = next(iter(loader)).images
    assert torch.equal(one, again)
    assert not torch.equal(one, view)
    assert not torch.equal(one, epoch)


def test_seeding_a_sample_leaves_the_process_as_it_was():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(1, 2, 3):
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    with seeded(1, 2, 3):
        assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


def test_unreadable_images_are_named_and_nothing_takes_their_place(folder):
    (folder / "train" / "cat" / "2.png").write_text("not an image")
    source = open_source(str(folder), "train")
    loader = Loader(
        source,
        evaluation_transform(16, None, *STATS),
        in_order(12, 6),
        seed=0,
        workers=2,
        device=torch.device("cpu"),
    )
    batches = list(loader)
    assert [len(b.labels) for b in batches] == [5, 6]
    assert [len(b.images) for b in batches] == [5, 6]
    ((name, reason),) = batches[0].unreadable
    assert name.endswith("cat/2.png")
    assert "not an image" in reason
    assert [d.image for d in batches[0].draws] == [0, 1, 3, 4, 5]


def draws(count, update=0):
    return [Draw(update, position, 0, position, 0) for position in range(count)]


def test_mixup_pairs_neighbours_by_one_share():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 0])
    settings = recipe("deit", cutmix=0.0, mixup=0.8)
    out, target = mix(images, labels, draws(4), 3, settings, seed=5)
    share = float(target[0, 0])
    assert 0.0 < share < 1.0
    expected = torch.tensor(
        [1 - share, share, 2 * share + 3 * (1 - share), 3 * share + 2 * (1 - share)]
    )
    assert torch.allclose(out[:, 0, 0, 0], expected)
    assert torch.allclose(target.sum(1), torch.ones(4))
    assert torch.allclose(target[1], torch.tensor([1 - share, share, 0.0]))


def test_cutmix_labels_follow_the_area():
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    settings = recipe("deit", mixup=0.0, cutmix=1.0)
    for update in range(20):
        out, target = mix(images, torch.tensor([0, 1]), draws(2, update), 2, settings, seed=5)
        foreign = (out[0] == 1.0).float().mean()
        assert float(target[0, 1]) == pytest.approx(float(foreign), abs=1e-6)


def test_the_odd_one_out_is_left_alone():
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2])
    some = draws(5)[1:4]  # 0 was unreadable: 1 stays, 2 and 3 mix
    out, target = mix(images, labels, some, 3, recipe("deit", cutmix=0.0), seed=0)
    assert torch.equal(out[0], images[0])
    assert torch.equal(target[0], torch.tensor([1.0, 0.0, 0.0]))
    assert not torch.equal(out[1], images[1])


def test_both_kinds_occur_about_equally_often():
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    mixed = [
        mix(images, torch.tensor([0, 1]), draws(2, u), 2, recipe("deit"), seed=0)[0]
        for u in range(200)
    ]
    blended = sum(bool(((x > 0.01) & (x < 0.99)).any()) for x in mixed)
    assert 60 < blended < 140


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for key, image, label in samples:
            file = io.BytesIO()
            image.save(file, "PNG")
            for suffix, data in (("png", file.getvalue()), ("cls", label)):
                if data is not None:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def colour(value):
    return Image.new("RGB", (6, 6), (value, 0, 0))


def test_shards_are_a_list(tmp_path):
    shard(tmp_path / "train-00.tar", [("a/1", colour(10), b"2"), ("a/2", colour(20), b"0")])
    shard(tmp_path / "train-01.tar", [("b/1", colour(30), b"1")])
    source = open_source(f"wds:{tmp_path}/{{split}}-{{00..01}}.tar", "train")
    assert len(source) == 3
    assert source.classes == ("0", "1", "2")
    assert [(im.getpixel((0, 0))[0], y) for im, y in map(source.read, range(3))] == [
        (10, 2),
        (20, 0),
        (30, 1),
    ]
    assert source.name(2).endswith("train-01.tar:b/1")


def test_remote_shards_are_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    shard(served / "val-0.tar", [("1", colour(10), b"0")])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        name = f"wds:http://127.0.0.1:{server.server_port}/{{split}}-0.tar"
        assert len(open_source(name, "val")) == 1
        (served / "val-0.tar").unlink()
        assert len(open_source(name, "val")) == 1
        with pytest.raises(ValueError, match=r"train-0.tar: HTTP Error 404"):
            open_source(name, "train")
        server.shutdown()


def test_bad_shards_are_named(tmp_path):
    (tmp_path / "train.tar").write_text("no tar")
    with pytest.raises(ValueError, match=r"train.tar"):
        open_source(f"wds:{tmp_path}/{{split}}.tar", "train")
    shard(tmp_path / "val.tar", [("x", colour(1), None)])
    with pytest.raises(ValueError, match=r"val.tar: no label \(x.cls\) for 1 images"):
        open_source(f"wds:{tmp_path}/{{split}}.tar", "val")
    with pytest.raises(ValueError, match=r"expected \{split\}"):
        open_source("wds:x.tar", "train")


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [colour(5), colour(6)], "label": [1, 0]}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "set")
    source = open_source(f"hf:{tmp_path / 'set'}", "val")
    assert source.classes == ("cat", "dog")
    assert (source.read(0)[0].getpixel((0, 0))[0], source.read(0)[1]) == (5, 1)
