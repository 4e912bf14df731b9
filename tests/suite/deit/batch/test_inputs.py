"""What a collection is made of: in order, streamed, and refused where something is missing."""

from __future__ import annotations

import os
import random
import tracemalloc

import collection
import pytest

from deit.batch import inputs
from deit.batch.inputs import Inputs, entries
from deit.data.images import find_images

JPEGS = collection.encoded(2)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def names(*given, **how):
    return [item.name for item in Inputs(given, **how)]


def test_a_folder_is_in_the_order_of_find_images(tmp_path):
    touch(tmp_path, "b.jpg", "a/2.PNG", "a/10.jpg", "a.jpg", "c/d/e.webp", "note.txt", "._b.jpg")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "c")
    assert names(tmp_path) == [str(path) for path in find_images(tmp_path)]
    assert len(names(tmp_path)) == 6


def test_links_that_lead_nowhere_are_files(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    (tmp_path / "note").symlink_to(tmp_path / "note")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "absent.jpg")
    found = names(tmp_path)
    assert found == [str(tmp_path / name) for name in ("a.jpg", "gone.jpg", "itself.jpg")]
    assert found == [str(path) for path in find_images(tmp_path)]


def test_a_list_of_odd_names(tmp_path):
    odd = ["a\rb.jpg", " c.jpg ", "d\udcff.jpg", "e\u2028f.jpg"]
    listed = tmp_path / "list.txt"
    text = "\n".join(odd).encode("utf-8", "surrogateescape")
    listed.write_bytes(b"\xef\xbb\xbf" + text)  # as Windows begins a file
    assert names(listed=listed) == odd


@pytest.mark.parametrize(
    ("given", "out", "apart"),
    [
        ("photos/**", "photos/a/out", False),
        ("**/*", "out", False),
        ("photos/*/*", "photos/out", False),
        ("photos/*/*", "link/out", False),
        ("link/*/*.parquet", "photos/out", False),
        ("photos/**/*.jpg", "photos/out", True),
        ("photos/*", "photos/out", True),  # a folder's images are taken, and nothing else
        ("photos/**", "photos/.out", True),
        ("photos/**", "out", True),
        (".*/*", "../out", True),
    ],
)
def test_an_output_folder_within_a_glob_is_refused(tmp_path, monkeypatch, given, out, apart):
    touch(tmp_path, "in/photos/a/b.jpg", "in/photos/out/c.parquet", "in/.d/e.jpg")
    (tmp_path / "in/link").symlink_to("photos")
    monkeypatch.chdir(tmp_path / "in")
    found = Inputs([given])
    if apart:
        found.check_apart(out)
    else:
        with pytest.raises(ValueError, match=r"images: .* takes in what is written into"):
            found.check_apart(out)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 500])
def test_a_large_folder_is_sorted_through_a_file(tmp_path, monkeypatch, count):
    monkeypatch.setattr(inputs, "SORTED_AT_ONCE", 8)
    monkeypatch.setattr(inputs, "_READ", 16)
    made = [f"{random.Random(count).random()}-{n}-é.jpg" for n in range(count)]
    touch(tmp_path, *made)
    if count:
        (tmp_path / made[0]).unlink()
        (tmp_path / made[0]).mkdir()
    wanted = [(name, name == made[0]) for name in sorted(made)]
    assert list(entries(str(tmp_path))) == wanted
    stream = entries(str(tmp_path))  # given up midway: the file goes
    next(stream, None)
    stream.close()


def test_memory_does_not_grow_with_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SORTED_AT_ONCE", 256)
    monkeypatch.setattr(inputs, "_READ", 1024)
    peaks = []
    for count in (2_000, 8_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            os.mknod(folder / f"a-name-of-some-length-{number:08d}.jpg")
        given = Inputs([folder])
        tracemalloc.start()
        assert sum(1 for _ in given) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 24 more sorted runs, a kilobyte or two of names each; the names alone are 600 KB.
    assert peaks[1] - peaks[0] < 24 * 8192


def test_globs(tmp_path, monkeypatch):
    touch(tmp_path, "b/2.jpg", "b/1.jpg", "a/3.jpg", "a/c/4.png", "a/.hidden/5.jpg", "note.txt")
    at = lambda *parts: [str(tmp_path / part) for part in parts]
    assert names(f"{tmp_path}/*/*.jpg") == at("a/3.jpg", "b/1.jpg", "b/2.jpg")
    assert names(f"{tmp_path}/**/*.[jp][pn]g") == at("a/3.jpg", "a/c/4.png", "b/1.jpg", "b/2.jpg")
    # Folders that match are walked, but for those that ** has walked.
    assert names(f"{tmp_path}/[ab]") == at("a/.hidden/5.jpg", "a/3.jpg", "a/c/4.png", "b/1.jpg",
                                           "b/2.jpg")  # fmt: skip
    assert sorted(names(f"{tmp_path}/a/**")) == at("a/3.jpg", "a/c/4.png")
    monkeypatch.chdir(tmp_path)
    assert names("b/*.jpg") == ["b/1.jpg", "b/2.jpg"]
    assert names("*/c/4.png") == ["a/c/4.png"]
    touch(tmp_path, "x[1].jpg")
    assert names("x[1].jpg") == ["x[1].jpg"]  # it is there by that very name


def test_shards_and_lists(tmp_path):
    for number in range(3):
        collection.shard(tmp_path / f"{number:02d}.tar", JPEGS, label=number > 0)
    given = f"{tmp_path}/{{00..02}}.tar"
    found = list(Inputs([given]))
    assert [item.name for item in found][:3] == [
        f"{tmp_path}/00.tar:0000.jpg",
        f"{tmp_path}/00.tar:0001.jpg",
        f"{tmp_path}/01.tar:0000.jpg",
    ]
    assert found[0].encoded() == JPEGS[0]
    assert names(f"{tmp_path}/*.tar") == [item.name for item in found]
    (tmp_path / "a.jpg").write_bytes(JPEGS[0])
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/a.jpg\r\n\n{tmp_path}/absent.jpg\n{tmp_path}/02.tar")
    assert names(listed=listed) == [
        f"{tmp_path}/a.jpg",
        f"{tmp_path}/absent.jpg",
        f"{tmp_path}/02.tar:0000.jpg",
        f"{tmp_path}/02.tar:0001.jpg",
    ]
    assert Inputs([given], listed).count() == (2, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "images: expected files, folders"),
        (["absent.jpg"], "images: no such file or folder: absent.jpg"),
        (["*.bmp"], r"images: nothing matches \*\.bmp"),
        (["a/**/b/**"], r"images: expected \*\* once"),
        (["empty"], "images: no image file in folder empty"),
        (["{0..3}.tar"], "images: no such shard: 1.tar"),
        (["a.jpg", "a.jpg"], "images: a.jpg is given twice"),
        (["a.jpg", "./a.jpg"], "images: ./a.jpg is given twice"),
        ([".", "sub"], r"images: sub is in \.: its images would come twice"),
        (["sub", "sub/b.jpg"], "images: sub/b.jpg is in sub: its"),
        (["sub", "./sub/*.jpg"], r"images: \./sub/\*\.jpg is in sub: its"),
    ],
)
def test_what_is_refused_at_once(tmp_path, monkeypatch, given, message):
    touch(tmp_path, "a.jpg", "sub/b.jpg", "sub-more/c.jpg", "0.tar")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        Inputs(given)
    Inputs(["sub", "sub-more", "a.jpg"])


def test_an_empty_list_and_none(tmp_path):
    (tmp_path / "list.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="list: no line in"):
        Inputs(listed=tmp_path / "list.txt")
    with pytest.raises(ValueError, match="list: expected a regular file; got a folder"):
        Inputs(listed=tmp_path)


def test_a_shard_that_was_cut_short_is_an_error(tmp_path):
    whole = collection.shard(tmp_path / "0.tar", JPEGS).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    stream = iter(Inputs([f"{tmp_path}/{{0..1}}.tar"]))
    assert [next(stream).name.rpartition("/")[2] for _ in range(2)] == [
        "0.tar:0000.jpg",
        "0.tar:0001.jpg",
    ]
    with pytest.raises(ValueError, match=r"1\.tar: cut short"):
        next(stream)
