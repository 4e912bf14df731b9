"""`deit.batch.Model`: bytes, paths and arrays in, numpy out, in any process."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import subprocess
import sys

import collection
import numpy as np
import pytest
import small
import torch
from PIL import Image
from torch import nn

from deit.batch import Model, images
from deit.data.images import Prepare, UnreadableImage, load_image, normalise
from deit.fused_vit import fuse

IMAGES = collection.encoded(5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return collection.weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "distilled.safetensors"
    return collection.weights(path, small.SMALL_DISTILLED)


@pytest.fixture(scope="module")
def model(weights):
    return Model(weights, batch_size=2)


def expected(settings, found=lambda network, images: network(images), images=IMAGES):
    """By the plain network, from the same photographs."""
    prepare = Prepare(64)
    pixels = torch.stack([prepare(load_image(image)) for image in images])
    with torch.inference_mode():
        return found(small.network(settings), normalise(pixels)).numpy()


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-4)


def test_bytes_paths_arrays_and_images_give_the_same(model, tmp_path):
    wanted = expected(small.SMALL)
    close(model(IMAGES), wanted)
    path = tmp_path / "a.jpg"
    path.write_bytes(IMAGES[0])
    forms = [path, str(path), bytearray(IMAGES[0]), memoryview(IMAGES[0]),
             np.asarray(load_image(IMAGES[0])), Image.open(io.BytesIO(IMAGES[0]))]  # fmt: skip
    for row in model(forms):
        close(row, wanted[0])
    stacked = np.stack([np.asarray(load_image(image)) for image in IMAGES])
    np.testing.assert_array_equal(model(stacked), model(IMAGES))
    column = np.array(IMAGES, dtype=object)  # as Ray and Spark hand a column over
    np.testing.assert_array_equal(model(column), model(IMAGES))


def test_outputs(weights, distilled):
    probabilities = Model(weights, output="probabilities")(IMAGES)
    close(probabilities, expected(small.SMALL, lambda m, x: m(x).softmax(-1)))
    embedding = Model(weights, output="embedding")(IMAGES)
    assert embedding.shape == (5, 192)
    assert embedding.dtype == np.float32
    close(embedding, expected(small.SMALL, lambda m, x: m.forward_features(x)[:, 0]))
    settings = small.SMALL_DISTILLED
    for head, tokens in (
        (None, slice(0, 2)),
        ("class", slice(0, 1)),
        ("distillation", slice(1, 2)),
    ):
        found = Model(distilled, output="embedding", test_head=head)(IMAGES)
        every = expected(settings, lambda m, x: m.forward_features(x))
        close(found, every[:, tokens].mean(1))


def test_an_embedding_still_shortens_the_last_block(weights, monkeypatch):
    model = Model(weights, output="embedding")
    asked = []
    kind = type(model._loaded.network)
    plain = kind.prefix_features
    monkeypatch.setattr(kind, "prefix_features", lambda s, x: asked.append(1) or plain(s, x))
    model(IMAGES)
    assert asked


def test_other_dtypes_and_the_plain_network(weights):
    wanted = expected(small.SMALL)
    plain = Model(weights, fused=False)
    np.testing.assert_allclose(plain(IMAGES), wanted, rtol=1e-5, atol=1e-5)
    network = small.network()
    fuse(network, dtype="int8")
    prepare = Prepare(64)
    with torch.inference_mode():
        pixels = torch.stack([prepare(load_image(image)) for image in IMAGES])
        eight = network(normalise(pixels)).numpy()
    np.testing.assert_allclose(Model(weights, dtype="int8")(IMAGES), eight, rtol=1e-4, atol=1e-3)
    half = Model(weights, dtype="bf16")(IMAGES)
    assert half.dtype == np.float32
    assert np.abs(half - wanted).max() < 0.1 * np.abs(wanted).max()


def test_an_unreadable_image_is_named_or_a_row(model, tmp_path):
    given = [IMAGES[0], b"no image", IMAGES[2], tmp_path / "absent.jpg"]
    values, errors = model.read(given)
    assert errors[0] is None
    assert errors[2] is None
    assert "not an image" in errors[1]
    assert "No such file" in errors[3]
    assert np.isnan(values[[1, 3]]).all()
    close(values[[0, 2]], model([IMAGES[0], IMAGES[2]]))
    with pytest.raises(UnreadableImage, match=r"images\[1\]: not an image"):
        model(given)
    with pytest.raises(UnreadableImage, match=r"absent\.jpg"):
        model(given[2:])
    assert model([]).shape == (0, 7)


def test_an_output_that_overflows_is_an_error(tmp_path):
    network = small.network()
    nn.init.constant_(network.head.weight, 3e38)
    from deit.weights.checkpoint import save

    save(network, tmp_path / "wild.safetensors")
    model = Model(tmp_path / "wild.safetensors")
    values, errors = model.read(IMAGES[:2])
    assert all("not finite in fp32" in error for error in errors)
    assert np.isnan(values).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("photo.jpg", "images: expected a sequence.*got str"),
        (b"\xff\xd8", "images: expected a sequence.*got bytes"),
        (7, "images: expected a sequence.*got int"),
        ([7], r"images\[0\]: expected bytes.*got int"),
        ([np.zeros((4, 4, 3))], r"images\[0\]: expected an array of uint8; got float64"),
        ([np.zeros((4, 4), np.uint8)], r"images\[0\]: expected an array \[height, width, 3\]"),
    ],
)
def test_what_is_no_image(model, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model(given)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"output": "features"}, "output: expected one of logits, probabilities, embedding"),
        ({"dtype": "fp64"}, "dtype: expected one of fp32"),
        ({"decode": "quick"}, "decode: expected one of exact, fast, scaled; got 'quick'"),
        ({"batch_size": 0}, "batch_size: expected at least 1; got 0"),
        ({"batch_size": True}, "batch_size: expected a whole number; got True"),
        ({"threads": 0}, "threads: expected at least 1; got 0"),
        ({"device": "cuda:99"}, "device: cannot use 'cuda:99'"),
        ({"test_head": "mean"}, "test_head: expected one of"),
        ({"output": "embedding", "test_head": "softmax-sum"}, "test_head: tokens have no softmax"),
        ({"dtype": "int8", "fused": False}, "dtype: int8 is of the fused operators"),
    ],
)
def test_bad_arguments(weights, how, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Model(weights, **how)


def test_no_weights_there(tmp_path):
    with pytest.raises((ValueError, OSError), match="absent"):
        Model(tmp_path / "absent.pth")


def _in_another_process(model, images, pipe):
    pipe.send(model(images))
    pipe.close()


def test_pickled_it_is_its_arguments_and_loads_in_a_spawned_process(model):
    data = pickle.dumps(model)
    assert len(data) < 1000  # no weights
    again = pickle.loads(data)
    assert again._network is None
    np.testing.assert_array_equal(again(IMAGES), model(IMAGES))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_another_process, args=(model, IMAGES[:2], theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    np.testing.assert_allclose(found, model(IMAGES[:2]), rtol=1e-5, atol=1e-5)


def test_a_relative_path_of_weights_is_found_from_elsewhere(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(weights.parent)
    data = pickle.dumps(Model(weights.name))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(data)(IMAGES[:1]).shape == (1, 7)


def test_threads(weights, threads):
    before = torch.get_num_threads()
    Model(weights)
    assert torch.get_num_threads() == before
    Model(weights, threads=1)(IMAGES)
    assert torch.get_num_threads() == 1


def test_decode_modes_differ_by_what_they_say(weights):
    photo = load_image(IMAGES[0]).resize((1600, 1200))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=90)
    pixels = {}
    for decode in ("exact", "fast", "scaled"):
        model = Model(weights, decode=decode)
        pixels[decode] = model.reader(file.getvalue()).int()
        assert model.about()["decode"] == decode
    assert torch.equal(pixels["exact"], Prepare(64)(load_image(file.getvalue())).int())
    away = {name: (each - pixels["exact"]).abs() for name, each in pixels.items()}
    assert away["fast"].max() <= 1
    assert (away["fast"] > 0).float().mean() < 0.02
    assert away["scaled"].float().mean() < 1


def jpeg(image, **how):
    file = io.BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def test_an_image_that_pillow_opened_is_as_its_bytes(model):
    turned = Image.Exif()
    turned[0x0112] = 6
    data = jpeg(load_image(IMAGES[1]), exif=turned)
    opened = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(model([opened]), model([data]))
    made = Image.open(io.BytesIO(data)).convert("RGB")  # keeps its EXIF; taken as it is
    np.testing.assert_array_equal(model([made]), model([np.asarray(made)]))


def test_an_image_that_pillow_opened_may_be_unreadable(model, monkeypatch):
    opened = Image.open(io.BytesIO(IMAGES[0][:2000]))
    values, errors = model.read([IMAGES[1], opened])
    assert errors[0] is None
    assert "truncated" in errors[1]
    assert np.isnan(values[1]).all()
    large = (Image.new("RGB", (20, 10)), Image.open(io.BytesIO(IMAGES[0])))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for image in large:
        assert "limit of 100" in model.read([image]).errors[0]
    monkeypatch.undo()
    assert "no defined range" in model.read([Image.new("F", (20, 10))]).errors[0]


def test_a_limit_that_is_no_number_is_no_image_s_fault(weights, monkeypatch):
    monkeypatch.setenv("DEIT_MAX_IMAGE_BYTES", "much")
    with pytest.raises(ValueError, match="DEIT_MAX_IMAGE_BYTES: expected a whole number"):
        Model(weights)


def test_fast_decoding_leaves_the_rest_to_pillow(monkeypatch, tmp_path):
    simplejpeg = pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    photo = load_image(IMAGES[1])
    turned = Image.Exif()
    turned[0x0112] = 6
    others = {
        "grey": jpeg(photo.convert("L")),
        "cmyk": jpeg(photo.convert("CMYK")),
        "turned": jpeg(photo, exif=turned),
    }
    fast, exact = images.Reader(64, None, "fast"), images.Reader(64, None)
    seen = []
    plain = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: seen.append(1) or plain(*a, **k))
    for name, data in others.items():
        assert (fast(data).int() - exact(data).int()).abs().max() <= 1, name
    assert not seen
    path = tmp_path / "a.jpg"
    path.write_bytes(IMAGES[1])
    whole = Prepare(64, fast=True)(load_image(IMAGES[1]))
    assert torch.equal(fast(IMAGES[1]), whole)
    assert torch.equal(fast(path), whole)
    assert len(seen) == 2
    for length in (10, 300, len(IMAGES[1]) // 2, len(IMAGES[1]) - 20):
        reasons = []
        for reader in (exact, fast):
            with pytest.raises(UnreadableImage) as error:
                reader(IMAGES[1][:length])
            reasons.append(error.value.reason)
        assert reasons[0] == reasons[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="limit of 200 pixels"):
        fast(IMAGES[1])


def test_both_decoders_give_the_same_pixels(monkeypatch):
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    kinds = [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)]
    photo = load_image(IMAGES[2]).resize((333, 251))
    fast = images.Reader(64, None, "fast")
    found = [fast(jpeg(photo, quality=80, **kind)) for kind in kinds]
    monkeypatch.setattr(images, "simplejpeg", None)
    for kind, each in zip(kinds, found, strict=True):
        assert torch.equal(each, fast(jpeg(photo, quality=80, **kind))), kind


def test_scaled_decoding_keeps_twice_the_size(weights):
    reader = Model(weights, decode="scaled").reader
    file = io.BytesIO()
    Image.new("RGB", (1600, 1200)).save(file, "JPEG")
    assert load_image(file.getvalue(), at_least=reader.at_least).size == (200, 150)  # of 73 px


def test_graphs_are_filled_up_to_the_next_size(weights, monkeypatch):
    """What a GPU does, on a graph that only notes its batch."""
    model = Model(weights, batch_size=6)
    network, sizes = model._loaded, []

    def graph(images):
        sizes.append(len(images))
        return network.network(images)

    wanted = model(IMAGES)
    network.graphs = dict.fromkeys((1, 2, 4, 6), graph)
    close(model(IMAGES), wanted)
    close(model(IMAGES[:3]), wanted[:3])
    close(model(IMAGES[:1]), wanted[:1])
    assert sizes == [6, 4, 1]


def test_the_core_imports_nothing_of_it():
    code = (
        "import sys, deit, deit.kernels, deit.batch;"
        "assert not {'pyarrow', 'ray', 'pyspark', 'litserve'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
