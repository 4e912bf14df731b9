"""`deit predict` on real photographs: official weights' layout, names, failures, JSON."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import skimage.data
import sklearn.datasets
import torch
from torch import nn

import deit
from deit.commands.cli import main
from deit.data.images import Prepare, load_image, normalise
from deit.predict import class_names
from deit.weights.checkpoint import save

SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
SKIMAGE = Path(skimage.data.__file__).parent
PHOTOS = [SKLEARN / "china.jpg", SKLEARN / "flower.jpg", SKIMAGE / "chelsea.png"]


def randomised(arch, **options):
    torch.manual_seed(0)
    model = deit.create(arch, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file as the official ones are: `model`, and an argparse.Namespace beside it."""
    path = tmp_path_factory.mktemp("weights") / "deit_tiny_distilled_patch16_224.pth"
    model = randomised("deit_tiny_distilled_patch16_224")
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Ten classes at 32 px."""
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    model = randomised("deit_ti", img_size=32, num_classes=10)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images of other statistics and another crop than ImageNet's."""
    folder = tmp_path_factory.mktemp("run")
    model = randomised("deit_ti", img_size=32, num_classes=3)
    save(model, folder / "model.safetensors")
    about = {
        "network": {"arch": "deit_ti", "img_size": 32},
        "classes": ["boot", "bag", "coat"],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
        "options": {"recipe": {"eval_crop": 1.0}},
    }
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def predict(capsys, *arguments):
    code = main(["predict", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def expected(path, photos, head):
    model = deit.load(path, test_head=head)
    images = torch.stack([normalise(Prepare(224)(load_image(photo))) for photo in photos])
    with torch.inference_mode():
        return model(images).softmax(-1)


@pytest.mark.parametrize(
    ("head", "fuse"),
    [
        ("class", "--fuse"),
        ("distillation", "--no-fuse"),
        ("softmax-sum", "--fuse"),
        ("softmax-sum", "--no-fuse"),
        ("logit-mean", "--fuse"),
    ],
)
def test_probabilities_are_the_networks(capsys, official, head, fuse):
    options = ("--weights", official, "--test-head", head, "--json", fuse)
    code, out, _ = predict(capsys, *PHOTOS, *options)
    assert code == 0
    document = json.loads(out)
    assert [entry["path"] for entry in document["predictions"]] == list(map(str, PHOTOS))
    assert document["unreadable"] == []
    rows = expected(official, PHOTOS, head)
    for row, entry in zip(rows, document["predictions"], strict=True):
        values, indices = row.topk(5)
        assert [guess["index"] for guess in entry["top"]] == indices.tolist()
        found = [guess["probability"] for guess in entry["top"]]
        assert found == pytest.approx(values.tolist(), rel=1e-3)


def test_text_names_imagenets_classes(capsys, official):
    code, out, err = predict(capsys, PHOTOS[0], "--weights", official, "--topk", 3)
    probabilities = expected(official, PHOTOS[:1], "softmax-sum")[0]
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == str(PHOTOS[0])
    assert len(lines) == 4
    best = probabilities.argmax().item()
    assert lines[1].endswith(class_names(1000)[best])
    assert f"{100 * probabilities[best]:.2f} %" in lines[1]
    assert "deit_ti⚗ at 224 px, fp32 on cpu, fused; 1 image" in err


def test_imagenets_names_stand_at_their_indices():
    names = class_names(1000)
    assert len(names) == 1000
    assert names[0].startswith("tench")
    assert names[281].startswith("tabby")
    assert names[999].startswith("toilet tissue")


def test_the_others_go_on_where_one_cannot_be_read(capsys, official, tmp_path):
    (tmp_path / "text.jpg").write_text("no photograph")
    (tmp_path / "cut.jpg").write_bytes(PHOTOS[0].read_bytes()[:20_000])
    shutil.copy(PHOTOS[1], tmp_path / "good.jpg")
    code, out, err = predict(capsys, tmp_path, tmp_path / "absent.jpg", "--weights", official)
    assert code == 1
    assert str(tmp_path / "good.jpg") in out
    assert "text.jpg: not an image in a known format" in err
    assert "cut.jpg: image file is truncated" in err
    assert "absent.jpg: no such file or folder" in err
    assert "Traceback" not in err


def test_nothing_readable_is_reported_too(capsys, small, tmp_path):
    (tmp_path / "text.jpg").write_text("no photograph")
    code, out, _ = predict(capsys, tmp_path / "text.jpg", "--weights", small, "--json")
    assert code == 1
    document = json.loads(out)
    assert document["predictions"] == []
    assert document["unreadable"][0]["path"] == str(tmp_path / "text.jpg")
    assert predict(capsys, tmp_path / "absent.jpg", "--weights", small)[0] == 1


def test_other_classes_are_numbered_or_named(capsys, small, tmp_path):
    _, out, _ = predict(capsys, PHOTOS[0], "--weights", small)
    assert "class " in out
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(f"name-{index}" for index in range(10)) + "\n")
    _, out, _ = predict(capsys, PHOTOS[0], "--weights", small, "--classes", listed)
    assert "name-" in out
    listed.write_text("one\ntwo\n")
    code, _, err = predict(capsys, PHOTOS[0], "--weights", small, "--classes", listed)
    assert code == 2
    assert "classes: expected 10 lines, one for each class of the network" in err
    listed.write_bytes(b"\xff\xfe")
    assert (
        "is not UTF-8 text"
        in predict(capsys, PHOTOS[0], "--weights", small, "--classes", listed)[2]
    )


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"\xef\xbb\xbfcat\ndog\nemu\n", ["cat", "dog", "emu"]),
        (b"cat\r\ndog\r\nemu", ["cat", "dog", "emu"]),
        ("cat\nd\u2028o\x85g\nemu\n".encode(), ["cat", "d\u2028o\x85g", "emu"]),
        (b"cat\nd\x0co\x0b\x1cg\nemu", ["cat", "d\x0co\x0b\x1cg", "emu"]),
        (b" cat \n\ndog\thound\n", [" cat ", "", "dog\thound"]),
    ],
)
def test_class_names_are_lines_whatever_they_hold(tmp_path, content, names):
    (tmp_path / "names.txt").write_bytes(content)
    assert class_names(3, tmp_path / "names.txt") == names


def test_class_names_come_from_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "names.txt")
    for path, what in ((tmp_path / "names.txt", "a FIFO"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ValueError, match=f"classes: expected a regular file; got {what}"):
            class_names(3, path)
    with open(tmp_path / "long.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="classes: expected at most 67108864 bytes"):
        class_names(3, tmp_path / "long.txt")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("how", ["text", "--json"])
def test_every_name_is_printed_by_every_stream(small, tmp_path, monkeypatch, encoding, how):
    photo = PHOTOS[0].read_bytes()
    given = [b"caf\xe9.jpg", "caf\u00e9.jpg".encode(), "\U0001f600.jpg".encode(), b"plain.jpg"]
    for name in given:
        Path(tmp_path, os.fsdecode(name)).write_bytes(photo)
    Path(tmp_path, os.fsdecode(b"b\xffd.jpg")).write_bytes(b"no")
    kept = io.BytesIO(), io.BytesIO()
    for name, file in zip(("stdout", "stderr"), kept, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(file, encoding, "strict"))
    flags = ["--weights", str(small), "--topk", "1", *([how] if how != "text" else [])]
    assert main(["predict", str(tmp_path), *flags]) == 1
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (file.getvalue() for file in kept)
    assert b"cannot read" in err
    assert b"b\xffd.jpg" in err
    if how == "--json":
        found = [os.fsencode(p["path"]) for p in json.loads(out)["predictions"]]
        assert sorted(Path(os.fsdecode(p)).name for p in found) == sorted(map(os.fsdecode, given))
        return
    assert out.count(b"%  class") == 4
    assert b"/caf\xe9.jpg\n" in out  # the bytes that name the file
    if encoding == "utf-8":
        assert all(name in out for name in given)
    else:
        assert b"/\\U0001f600.jpg" in out


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_image_size_and_dtype(capsys, small, dtype):
    options = ("--weights", small, "--img-size", 64, "--dtype", dtype)
    code, _, err = predict(capsys, PHOTOS[0], *options)
    assert code == 0
    assert f"deit_ti↑64 at 64 px, {dtype} on cpu" in err


def test_batches(capsys, small):
    _, whole, _ = predict(capsys, *PHOTOS, "--weights", small, "--json")
    _, single, _ = predict(capsys, *PHOTOS, "--weights", small, "--json", "--batch-size", 1)
    whole, single = json.loads(whole)["predictions"], json.loads(single)["predictions"]
    assert [p["path"] for p in whole] == [p["path"] for p in single]
    for one, other in zip(whole, single, strict=True):
        assert [g["index"] for g in one["top"]] == [g["index"] for g in other["top"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--weights: expected a file, for random weights predict nothing.*a1311bcf.pth"),
        (("--weights", "absent.pth"), "no such weights file: absent.pth"),
        (("--weights", "SMALL", "--arch", "deit_q"), "arch: unknown name 'deit_q'"),
        (("--weights", "SMALL", "--arch", "deit_s"), "do not fit deit_s"),
        (("--weights", "SMALL", "--img-size", "225"), "img_size: expected a positive multiple"),
        (("--weights", "SMALL", "--topk", "11"), "topk: expected 1 to 10.*got 11"),
        (("--weights", "SMALL", "--topk", "0"), "topk: expected 1 to 10.*got 0"),
        (("--weights", "SMALL", "--batch-size", "0"), "batch_size: expected at least 1"),
        (("--weights", "SMALL", "--threads", "0"), "--threads: expected at least 1; got 0"),
        (("--weights", "SMALL", "--dtype", "int8", "--no-fuse"), "--dtype: int8 is of the fused"),
        (("--weights", "SMALL", "--device", "toaster"), "device: cannot use 'toaster'"),
        (("--weights", "SMALL", "--classes", "absent.txt"), "No such file.*absent.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, small, arguments, message):
    arguments = [str(small) if a == "SMALL" else a for a in arguments]
    code, out, err = predict(capsys, PHOTOS[0], *arguments)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("deit: error: ")
    assert re.search(message, last), last
    assert "Traceback" not in err


def test_no_images_and_an_empty_folder(capsys, small, tmp_path):
    code, _, err = predict(capsys, "--weights", small)
    assert (code, "expected at least one file or folder" in err) == (2, True)
    code, _, err = predict(capsys, tmp_path, "--weights", small)
    assert (code, "no image file in folder" in err) == (2, True)


def test_an_output_that_is_not_finite_is_an_error(capsys, tmp_path):
    model = randomised("deit_ti", img_size=32, num_classes=10)
    with torch.no_grad():
        model.norm.weight.fill_(1e10)
        model.head.weight.mul_(1e30)
    torch.save(model.state_dict(), tmp_path / "huge.pth")
    code, _, err = predict(capsys, PHOTOS[0], "--weights", tmp_path / "huge.pth")
    assert code == 2
    assert "the network's output is not finite" in err


def test_a_run_prepares_and_names_as_it_was_trained(run, capsys):
    code, out, _ = predict(capsys, PHOTOS[0], "--weights", run, "--topk", 3, "--json")
    assert code == 0
    top = json.loads(out)["predictions"][0]["top"]
    pixels = Prepare(32, 1.0)(load_image(PHOTOS[0])).double() / 255
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]], dtype=torch.float64).view(
        2, 3, 1, 1
    )
    model = deit.load(run / "model.safetensors").double()
    with torch.no_grad():
        wanted = model(((pixels - mean) / std)[None]).softmax(-1)[0]
    found = torch.empty(3, dtype=torch.float64)
    for guess in top:
        assert guess["name"] == ("boot", "bag", "coat")[guess["index"]]
        found[guess["index"]] = guess["probability"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
