"""Labelled images: sources, augmentation by counters, mixing."""
# ruff: noqa: NPY002 (the augmentation libraries draw from the global generator)

import gzip
import io
import random
import struct

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision.datasets import ImageFolder

from deit.data.augment import evaluation_transform, mix, seeded, training_transform
from deit.data.images import UnreadableImage
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


def test_classes_that_a_network_does_not_count_in_are_refused(folder, datasets):
    assert open_source(str(folder), "val", ("ant", "cat", "dog")).labels == [1] * 8 + [2] * 4
    save_hub(datasets, folder / "set", [colour(5)], [1])
    name = f"hf:{folder / 'set'}"
    assert open_source(name, "val", ("cat", "dog")).labels.tolist() == [1]
    with pytest.raises(ValueError, match=r"the classes ant, cat, ... \(2 in all\); hf:.* has cat"):
        open_source(name, "val", ("ant", "cat"))
    assert open_source(name, "val", ("0", "1")).classes == ("cat", "dog")  # of a run on shards


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


def colour(value):
    return Image.new("RGB", (6, 6), (value, 0, 0))


def save_hub(datasets, folder, images, labels, **more):
    """A dataset of train and test, as `save_to_disk` keeps it; `more` columns hold images, too."""
    kinds = {name: datasets.Image() for name in ("image", *more)}
    features = datasets.Features({**kinds, "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": images, "label": labels, **more}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(folder)
    return data


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="needs the package datasets")


def test_hugging_face_datasets(datasets, tmp_path):
    save_hub(datasets, tmp_path / "set", [colour(5), colour(6)], [1, 0])
    source = open_source(f"hf:{tmp_path / 'set'}", "val")
    assert source.classes == ("cat", "dog")
    assert (source.read(0)[0].getpixel((0, 0))[0], source.read(0)[1]) == (5, 1)


def test_no_decoder_that_runs_programs_is_tried_on_a_hugging_face_dataset(
    datasets, tmp_path, monkeypatch
):
    file, ran = io.BytesIO(), []
    colour(7).save(file, "EPS")
    eps = {"bytes": file.getvalue(), "path": None}
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: ran.append(1))
    (tmp_path / "file.png").write_bytes(file.getvalue())
    rows = [eps, colour(6), {"bytes": None, "path": str(tmp_path / "file.png")}]
    data = save_hub(datasets, tmp_path / "set", rows, [0, 1, 0], other=[eps] * 3)
    source = open_source(f"hf:{tmp_path / 'set'}", "train")
    for index in (0, 2):
        with pytest.raises(UnreadableImage, match="not an image in a known format"):
            source.read(index)
    assert source.read(1)[0].getpixel((0, 0)) == (6, 0, 0)  # its other image is EPS
    data.save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="expected a DatasetDict, with splits; got a Dataset"):
        open_source(f"hf:{tmp_path / 'one'}", "train")
    assert not ran


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limits_hold_in_a_hugging_face_dataset(datasets, tmp_path, monkeypatch):
    save_hub(datasets, tmp_path / "set", [colour(5)], [1])
    source = open_source(f"hf:{tmp_path / 'set'}", "train")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(UnreadableImage, match="6 x 6 pixels exceed Pillow's limit of 30"):
        source.read(0)
    monkeypatch.setenv("DEIT_MAX_IMAGE_BYTES", "20")
    with pytest.raises(UnreadableImage, match="bytes exceed DEIT_MAX_IMAGE_BYTES=20"):
        source.read(0)


@pytest.mark.parametrize("limit", [None, 3])
def test_images_without_a_label_are_refused_before_any_is_read(datasets, tmp_path, limit):
    save_hub(datasets, tmp_path / "set", [colour(5)] * 4, [1, -1, None, 0])
    source = open_source(f"hf:{tmp_path / 'set'}", "val", limit=limit)
    loader = Loader(source, None, in_order(2, 2), seed=0, workers=0, device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"data: expected labels from 0 to 1; .*set/\d with label -1"
    ):
        next(iter(loader))


def test_a_class_folder_may_be_a_link_and_hold_links(folder):
    elsewhere = folder / "elsewhere"
    (folder / "train" / "dog").rename(elsewhere)
    (folder / "train" / "dog").symlink_to(elsewhere)
    (folder / "train" / "cat" / "album").symlink_to(elsewhere)
    for name in ("nowhere", "self"):
        (folder / "train" / "cat" / name).symlink_to("self")
    source = open_source(str(folder), "train")
    theirs = ImageFolder(folder / "train")
    assert sorted(zip(map(str, source.paths), source.labels, strict=True)) == sorted(theirs.samples)
    assert list(source.labels).count(0) == 12


def test_an_image_too_elongated_to_be_resized_is_unreadable_and_the_others_go_on(folder):
    Image.new("RGB", (1, 65_535)).save(folder / "train" / "cat" / "9.png")
    source, how = open_source(str(folder), "train"), {"seed": 0, "device": torch.device("cpu")}
    transform = evaluation_transform(224, None, *STATS)
    (batch,) = Loader(source, transform, in_order(13, 13), workers=0, **how)
    assert len(batch.labels) == 12
    ((name, reason),) = batch.unreadable
    assert name.endswith("9.png")
    assert "1 x 65535 is too elongated" in reason


def test_an_idx_file_that_unpacks_without_end_is_damaged(tmp_path):
    header = struct.pack(">4I", 0x803, 2, 28, 28)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + bytes(1 << 24))
    with pytest.raises(ValueError, match=r"damaged .*\(1569 bytes for 1568\)"):
        FashionMnist.open(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *[2**32 - 1] * 3))
    with pytest.raises(ValueError, match="damaged"):
        FashionMnist.open(tmp_path, "train")
