"""Photographs: found, decoded, prepared as in evaluation; what cannot be read is named."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import torch
from PIL import Image, ImageOps

from deit.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NothingReadable,
    PhotoLoader,
    Prepare,
    UnreadableImage,
    crop_ratio,
    find_images,
    load_image,
    normalise,
)

SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
SKIMAGE = Path(skimage.data.__file__).parent
CHINA, FLOWER = SKLEARN / "china.jpg", SKLEARN / "flower.jpg"


@pytest.fixture
def folder(tmp_path):
    """Four photographs and four files that only look like some."""
    shutil.copy(CHINA, tmp_path / "a.jpg")
    shutil.copy(FLOWER, tmp_path / "B.JPEG")
    (tmp_path / "inner").mkdir()
    shutil.copy(SKIMAGE / "chelsea.png", tmp_path / "inner" / "c.png")
    shutil.copy(SKIMAGE / "camera.png", tmp_path / "inner" / "d.PNG")
    (tmp_path / "notes.txt").write_text("no image and not called one")
    (tmp_path / "text.jpg").write_text("a text file named .jpg")
    (tmp_path / "empty.png").touch()
    content = CHINA.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    content = (SKIMAGE / "chelsea.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    return tmp_path


def names(paths):
    return [path.name for path in paths]


# ---- finding


def test_folders_are_searched_in_order_whatever_the_case(folder):
    found = find_images(folder)
    assert found == sorted(found)
    assert set(names(found)) == {
        *("a.jpg", "B.JPEG", "c.png", "d.PNG", "text.jpg", "empty.png", "cut.jpg", "cut.png")
    }


def test_files_are_taken_as_named_and_once(folder):
    found = find_images(
        [folder / "notes.txt", folder / "a.jpg", folder / "inner", folder / "a.jpg"]
    )
    assert names(found) == ["notes.txt", "a.jpg", "c.png", "d.PNG"]
    assert find_images(str(folder / "a.jpg")) == [folder / "a.jpg"]


def test_nothing_to_find(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"images: no image file in folder .*\.jpeg"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match=r"images: no such file or folder: .*absent"):
        find_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="images: expected at least one"):
        find_images([])


def test_links_to_folders_are_followed_but_not_in_circles(folder):
    albums = folder / "albums"
    albums.mkdir()
    (albums / "one").symlink_to(folder / "inner")
    (albums / "two").symlink_to(folder / "inner")
    (albums / "up").symlink_to(folder)
    found = [str(path.relative_to(albums)) for path in find_images(albums)]
    assert [name for name in found if not name.startswith("up/")] == [
        *("one/c.png", "one/d.PNG", "two/c.png", "two/d.PNG")
    ]
    # `up` leads to all of the folder, and from there not to the albums again.
    assert len(found) == 4 + 8
    (folder / "inner" / "self").symlink_to(folder / "inner")
    assert names(find_images(folder / "inner")) == ["c.png", "d.PNG"]


def test_macos_files_beside_images_are_none(folder):
    for name in ("._a.jpg", "inner/._c.png"):
        (folder / name).write_bytes(b"\0\5\x16\7 AppleDouble")
    assert len(find_images(folder)) == 8
    assert find_images(folder / "._a.jpg") == [folder / "._a.jpg"]  # as named


# ---- decoding


def test_photographs_decode_to_rgb():
    for path in (CHINA, SKIMAGE / "chelsea.png", SKIMAGE / "rocket.jpg"):
        image = load_image(path)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_converted(tmp_path, mode):
    source = Image.open(CHINA).resize((64, 48))
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    source.convert(mode).save(path, quality=95) if path.suffix == ".jpg" else source.convert(
        mode
    ).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    expected = source if mode not in ("1", "L", "LA") else source.convert("L").convert("RGB")
    difference = np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean()
    assert difference < (130 if mode == "1" else 20)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode == "I;16"
    shown = np.asarray(load_image(tmp_path / "deep.png"))[..., 0]
    assert np.abs(shown - values / 256).max() <= 1.0


def test_modes_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImage, match="mode 'F' has no defined range"):
        load_image(tmp_path / "float.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    turned = {3: "ROTATE_180", 6: "ROTATE_270", 8: "ROTATE_90", 2: "FLIP_LEFT_RIGHT"}
    turned |= {4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 7: "TRANSVERSE"}
    image = Image.open(FLOWER).resize((64, 32))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    how = turned.get(orientation)
    expected = image if how is None else image.transpose(Image.Transpose[how])
    assert np.array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.asarray(expected))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(entries, after=b"\0\0\0\0"):
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + after


SIX = (0x0112, 3, 1, b"\6\0\0\0")
BROKEN = {  # EXIF, and whether its orientation, 6, can be read
    "noise": (bytes(range(64)), False),
    "empty": (b"", False),
    "cut": (b"II*\0\x08\0\0\0\x06\0\x12\x01\x03", False),
    "no header": (b"\0\x08\0\x02\x01\x12\0\x03", False),
    "beyond": (b"II*\0\xff\xff\xff\x0f", False),
    "a text": (exif([(0x0112, 2, 2, b"6\0\0\0")]), False),
    "nine": (exif([(0x0112, 3, 1, b"\x09\0\0\0")]), False),
    "six": (exif([SIX]), True),
    "a bad rational": (exif([SIX, (0x011A, 5, 1, b"\xf0\xff\0\0")]), True),
    "a bad thumbnail": (exif([SIX], b"\xf0\xf0\0\0"), True),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says that EXIF is corrupt
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_exif_turns_nothing_and_is_no_fault_of_the_pixels(tmp_path, kind, name):
    image, path = Image.open(CHINA).resize((64, 48)), tmp_path / f"image.{kind}"
    broken, turned = BROKEN[name]
    if kind == "png":  # Pillow would not write it
        image.save(path)
        data = path.read_bytes()
        path.write_bytes(data[:33] + chunk(b"eXIf", broken) + data[33:])
    else:
        image.save(
            path, exif=b"Exif\0\0" + broken, **({"lossless": True} if kind == "webp" else {})
        )
    expected = Image.open(path).convert("RGB")
    if turned:
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(expected))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(tmp_path, kind, orientation):
    image, path = Image.open(FLOWER).resize((64, 32)), tmp_path / f"image.{kind}"
    tags = image.getexif()
    tags[0x0112] = orientation
    image.save(path, exif=tags)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(expected))


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.jpg")
    shutil.copy(CHINA, tmp_path / "q.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    loader = PhotoLoader(find_images(tmp_path), 32, workers=0)
    assert [names(paths) for _, paths in loader] == [["q.jpg"]]
    assert [bad.reason for bad in loader.unreadable] == [
        "expected a regular file; got a FIFO",
        "expected a regular file; got a device",
    ]


def test_the_limit_of_bytes_holds_before_a_file_is_read(tmp_path, monkeypatch):
    with open(tmp_path / "long.jpg", "wb") as file:
        file.truncate(1 << 40)  # no block of it is on the disk
    with pytest.raises(UnreadableImage, match=r"exceed DEIT_MAX_IMAGE_BYTES=268435456"):
        load_image(tmp_path / "long.jpg")
    monkeypatch.setenv("DEIT_MAX_IMAGE_BYTES", "1000")
    for source in (CHINA, CHINA.read_bytes()):
        with pytest.raises(UnreadableImage, match=r"\d+ bytes exceed DEIT_MAX_IMAGE_BYTES=1000"):
            load_image(source)
    monkeypatch.setenv("DEIT_MAX_IMAGE_BYTES", "many")
    with pytest.raises(ValueError, match="DEIT_MAX_IMAGE_BYTES: expected a whole number above 0"):
        load_image(CHINA)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.jpg", "not an image in a known format"),
        ("empty.png", "not an image in a known format"),
        ("cut.jpg", "truncated"),
        ("cut.png", "truncated"),
        ("absent.jpg", "No such file"),
        ("inner", "Is a directory"),
    ],
)
def test_unreadable_files_say_why(folder, name, reason):
    with pytest.raises(UnreadableImage, match=f"{name}: .*{reason}") as caught:
        load_image(folder / name)
    assert caught.value.path == folder / name


def test_decoders_that_run_programs_are_not_tried(tmp_path):
    buffer = io.BytesIO()
    Image.open(CHINA).resize((8, 8)).save(buffer, "EPS")
    (tmp_path / "postscript.png").write_bytes(buffer.getvalue())
    with pytest.raises(UnreadableImage, match="not an image in a known format"):
        load_image(tmp_path / "postscript.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [640 * 427 - 1, 1000])
def test_the_pixel_limit_holds(monkeypatch, limit):
    # Pillow itself only warns up to twice its limit, and raises above
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnreadableImage, match=r"exceed|decompression bomb"):
        load_image(CHINA)


# ---- preparing


def test_evaluation_is_the_papers():
    assert (Prepare(224).short_side, Prepare(384).short_side) == (256, 384)
    assert (crop_ratio(160), crop_ratio(224), crop_ratio(384), crop_ratio(448)) == (
        *(0.875, 0.875),
        *(1.0, 1.0),
    )


@pytest.mark.parametrize("size", [224, 384])
def test_pixels_are_those_of_timms_evaluation(size):
    from timm.data import create_transform

    ratio = 0.875 if size == 224 else 1.0
    theirs = create_transform(size, interpolation="bicubic", crop_pct=ratio, crop_mode="center")
    for path in (CHINA, SKIMAGE / "chelsea.png", SKIMAGE / "camera.png"):
        image = load_image(path)
        ours = normalise(Prepare(size)(image))
        assert ours.shape == (3, size, size)
        assert (ours - theirs(image)).abs().max() < 1e-5


def test_normalise():
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    kept = images.clone()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(normalise(images), (images / 255 - mean) / std, atol=1e-6)
    assert torch.equal(images, kept)
    assert normalise(images, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"images: expected torch\.uint8; got torch\.float32"):
        normalise(images.float())


def test_bad_sizes():
    with pytest.raises(ValueError, match="size: expected at least 1"):
        Prepare(0)
    with pytest.raises(ValueError, match=r"ratio: expected in \(0, 1\]; got 1.5"):
        Prepare(224, 1.5)


# ---- loading


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_full_ordered_and_without_what_cannot_be_read(folder, workers):
    paths = find_images(folder)
    loader = PhotoLoader(paths, 32, 3, workers=workers)
    for _ in range(2):  # a second pass counts anew
        batches = list(loader)
        assert [images.shape[0] for images, _ in batches] == [3, 1]
        read = [path for _, chosen in batches for path in chosen]
        assert names(read) == ["B.JPEG", "a.jpg", "c.png", "d.PNG"]
        for path, image in zip(read, torch.cat([images for images, _ in batches]), strict=True):
            assert torch.equal(image, normalise(Prepare(32)(load_image(path))))
        assert names(bad.path for bad in loader.unreadable) == [
            *("cut.jpg", "cut.png", "empty.png", "text.jpg")
        ]
        assert loader.read == 4


def test_summary_names_what_could_not_be_read(folder):
    loader = PhotoLoader(find_images(folder), 32, workers=0)
    list(loader)
    text = loader.summary()
    assert text.startswith("4 of 8 images read; 4 unreadable: ")
    assert "text.jpg (not an image in a known format)" in text
    assert loader.summary(limit=1).endswith("; and 3 more")


def test_nothing_readable(folder):
    loader = PhotoLoader([folder / "text.jpg", folder / "cut.jpg"], 32, workers=0)
    with pytest.raises(NothingReadable, match=r"0 of 2 images read; 2 unreadable: .*text.jpg"):
        list(loader)


def test_an_elongated_image_cannot_exhaust_memory(tmp_path):
    Image.new("RGB", (4_000, 1)).save(tmp_path / "line.png")
    shutil.copy(CHINA, tmp_path / "good.jpg")
    loader = PhotoLoader(find_images(tmp_path), 224, workers=0)
    assert [names(paths) for _, paths in loader] == [["good.jpg"]]
    assert "4000 x 1 is too elongated" in loader.unreadable[0].reason


def test_images_in_another_dtype():
    ((images, _),) = PhotoLoader([CHINA], 32, dtype=torch.bfloat16)
    assert images.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": []}, "paths: expected at least one image"),
        ({"batch_size": 0}, "batch_size: expected at least 1; got 0"),
        ({"workers": -1}, "workers: expected at least 0; got -1"),
        ({"size": 0}, "size: expected at least 1 pixel"),
    ],
)
def test_bad_loaders(options, message):
    with pytest.raises(ValueError, match=message):
        PhotoLoader(**{"paths": [CHINA], **options})
