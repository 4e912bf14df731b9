"""WebDataset shards: read whole or refused; remote ones fetched within limits."""

import bz2
import contextlib
import functools
import gzip
import http.server
import io
import lzma
import os
import socket
import tarfile
import threading
import time

import pytest
from PIL import Image

from deit.data import fetch, shards
from deit.data.images import UnreadableImage
from deit.data.sources import open_source


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (6, 6), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def sample(key, value, label):
    return [(f"{key}.png", png(value)), (f"{key}.cls", label)]


def write(path, members, mode="w", form=tarfile.PAX_FORMAT):
    """`members` are names with bytes, or with (type, link name)."""
    with tarfile.open(path, mode, format=form) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                member.type, member.linkname = data
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def opened(folder, name="train.tar", split="train"):
    return open_source(f"wds:{folder}/{name.replace('train', '{split}')}", split)


def contents(source):
    return [(im.getpixel((0, 0))[0], y) for im, y in map(source.read, range(len(source)))]


PAIR = sample("a/1", 10, b"2") + sample("a/2", 20, b" 0\n")


def test_shards_are_a_list(tmp_path):
    write(tmp_path / "train-00.tar", PAIR)
    write(tmp_path / "train-01.tar", sample("b/1", 30, b"1"))
    source = open_source(f"wds:{tmp_path}/{{split}}-{{00..01}}.tar", "train")
    assert (len(source), source.classes) == (3, ("0", "1", "2"))
    assert contents(source) == [(10, 2), (20, 0), (30, 1)]
    assert source.labels.tolist() == [2, 0, 1]
    assert source.name(2).endswith("train-01.tar:b/1")


def test_bad_shards_are_named(tmp_path):
    (tmp_path / "train.tar").write_text("no tar")
    with pytest.raises(ValueError, match=r"train.tar"):
        opened(tmp_path)
    write(tmp_path / "val.tar", [("x.png", png(1))])
    with pytest.raises(ValueError, match=r"val.tar: no label \(x.cls\) for 1 images"):
        opened(tmp_path, split="val")
    with pytest.raises(ValueError, match=r"expected \{split\}"):
        open_source("wds:x.tar", "train")


HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE
READ = {
    "upper case": [("1.PNG", png(10)), ("1.CLS", b"2"), ("2.Png", png(20)), ("2.Cls", b"0")],
    "macOS's files": [("._1.png", b"\0\5"), ("d/._1.cls", b"\0\5"), *PAIR],
    "hard links": [*PAIR[:2], ("2.png", (HARD, "a/1.png")), ("2.cls", (HARD, "a/1.cls"))],
    "links": [*PAIR[:2], ("b/2.png", (SOFT, "../a/1.png")), ("b/2.cls", (SOFT, "../a/1.cls"))],
    "a link before its file": [("1.png", (SOFT, "x/y.png")), ("1.cls", b"2"), ("x/y.png", png(10)),
                               ("x/y.cls", b"2")],
    "labels first": [PAIR[3], PAIR[1], PAIR[0], PAIR[2]],
    "other members": [("a/1.json", b"{}"), *PAIR, ("a/2.seg.npy", b"x"), ("d.txt", (HARD, "?"))],
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_whatever_tar_writes_is_read(tmp_path, what):
    write(tmp_path / "train.tar", READ[what])
    expected = [(10, 2), (10, 2) if "link" in what else (20, 0)]
    assert contents(opened(tmp_path)) == expected


REFUSED = {
    r"1 has two images": [("1.jpg", png(5)), ("1.png", png(10)), ("1.cls", b"0")],
    r"a/1 has two images": [*PAIR, PAIR[0]],
    r"a/2 has two labels": [*PAIR, PAIR[3]],
    r"no image for 1 labels \(1.cls\)": [("1.heic", b"?"), ("1.cls", b"0"), *PAIR],
    r"no label \(1.input.cls\) for 1 images": [("1.input.png", png(1)), ("1.cls", b"0")],
    r"1.cls: expected a label, .* from 0; got b'cat'": sample("1", 1, b"cat"),
    r"1.cls: expected a label, .* got b'-1'": sample("1", 1, b"-1"),
    r"1.cls: expected a label, .* got b'1_0'": sample("1", 1, b"1_0"),
    r"1.cls: expected a label, .* got b'0000": sample("1", 1, b"0" * 100),
    r"has label 1000000; DEIT_MAX_CLASSES is 1000000": sample("1", 1, b"1000000"),
    r"1.png is a link to 0.png, which is no file": [("1.png", (HARD, "0.png")), ("1.cls", b"0")],
    r"1.png is no plain file": [("1.png", (tarfile.FIFOTYPE, "")), ("1.cls", b"0")],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_lose_a_sample_is_refused_with_the_reason(tmp_path, message):
    write(tmp_path / "train.tar", REFUSED[message])
    with pytest.raises(ValueError, match=rf"data: .*{message}"):
        opened(tmp_path)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_shard_cut_short_anywhere_is_refused(tmp_path, form):
    path = write(tmp_path / "train.tar", [(f"{'d' * 120}/{n}", d) for n, d in PAIR], form=form)
    data = path.read_bytes()
    assert len(opened(tmp_path)) == 2
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for size in range(0, end, 256):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"data: .*train.tar: "):
            opened(tmp_path)
    path.write_bytes(data[:end] + bytes(512))  # one block of zeros is an end
    assert len(opened(tmp_path)) == 2


def test_damage_within_and_tars_joined_by_cat_are_refused(tmp_path):
    path = write(tmp_path / "train.tar", PAIR)
    data = path.read_bytes()
    path.write_bytes(data[:2048] + b"?" + data[2049:])  # the third member's header
    with pytest.raises(ValueError, match="damaged at byte 2048"):
        opened(tmp_path)
    path.write_bytes(data + data)
    with pytest.raises(ValueError, match="more follows its end at byte 4096"):
        opened(tmp_path)


def test_an_image_of_gigabytes_is_unreadable_and_a_header_of_gigabytes_an_error(tmp_path):
    path = write(tmp_path / "train.tar", [("1.cls", b"0")])
    header = tarfile.TarInfo("1.png")
    header.size = 5 << 30
    with open(path, "r+b") as file:  # the image is a hole in the file
        file.seek(1024)
        file.write(header.tobuf())
        file.seek(header.size, os.SEEK_CUR)
        file.write(bytes(1024))
    with pytest.raises(UnreadableImage, match="5368709120 bytes exceed DEIT_MAX_IMAGE_BYTES"):
        opened(tmp_path).read(0)
    header.type = tarfile.GNUTYPE_LONGNAME
    with open(path, "r+b") as file:
        file.seek(1024)
        file.write(header.tobuf())
    with pytest.raises(ValueError, match="a header of 5368709120 bytes"):
        opened(tmp_path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.tar")
    (tmp_path / "val.tar").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"train.tar: expected a regular file; got a FIFO"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"val.tar: expected a regular file; got a device"):
        opened(tmp_path, split="val")


def test_patterns_count_up_and_not_for_ever():
    assert shards.expand("a{08..10}b{0..1}") == [
        *("a08b0", "a08b1", "a09b0", "a09b1", "a10b0", "a10b1")
    ]
    for absurd in ("{0..99999999999}", "{0..999}{0..999}", "{0..999999999999999999999}"):
        with pytest.raises(ValueError, match=r"data: .*(DEIT_MAX_SHARDS is 100000|small numbers)"):
            shards.expand(absurd)
    with pytest.raises(ValueError, match=r"expected a range that counts up; got 3..1"):
        shards.expand("{3..1}")


# ---- compressed


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fused-deit" / "shards"


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "train.tar.bz2", "train.tar"])
@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_decompressed_once_whatever_they_are_called(
    tmp_path, cache, name, kind, monkeypatch
):
    path = write(tmp_path / name, PAIR, f"w:{kind}")
    assert contents(opened(tmp_path, name)) == [(10, 2), (20, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_copy", None)
        assert len(opened(tmp_path, name)) == 2
    write(path, PAIR[:2], f"w:{kind}")  # another file by that name
    source = opened(tmp_path, name)
    assert contents(source) == [(10, 2)]
    assert source.name(0) == f"{path}:a/1"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"data: .*{name}: "):
        opened(tmp_path, name)
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
def test_a_bomb_ends_at_a_stated_ratio(tmp_path, cache, module):
    write(tmp_path / "train.tar", PAIR)
    bomb = module.compress((tmp_path / "train.tar").read_bytes() + bytes(1 << 26))
    (tmp_path / "train.tar").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"more than 13107200 bytes, .* DEIT_MAX_SHARD_RATIO"):
        opened(tmp_path)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_compression_that_is_not_read_is_named(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(ValueError, match="plain or as gz, bz2 or xz; got zstd or lz4"):
        opened(tmp_path)


# ---- remote


@contextlib.contextmanager
def serving(handler):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"wds:http://127.0.0.1:{server.server_port}/{{split}}-0.tar"
        server.shutdown()


def test_remote_shards_are_fetched_once(tmp_path, cache):
    served = tmp_path / "served"
    served.mkdir()
    write(served / "val-0.tar", PAIR)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with serving(handler) as name:
        source = open_source(name, "val")
        assert source.name(0).startswith("http://")
        (served / "val-0.tar").unlink()
        assert contents(open_source(name, "val")) == [(10, 2), (20, 0)]
        with pytest.raises(ValueError, match=r"train-0.tar: HTTP Error 404"):
            open_source(name, "train")


class Faulty(http.server.BaseHTTPRequestHandler):
    """Serves `data` right after as many attempts as `faults` has, each of those done once."""

    data, faults, asked = b"", (), 0

    def do_GET(self):
        cls = type(self)
        cls.asked += 1
        fault = cls.faults[cls.asked - 1] if cls.asked <= len(cls.faults) else "none"
        if fault == "hang up":
            return
        if fault == "silence":
            time.sleep(3)
            return
        if fault == "busy":
            self.send_error(503)
            return
        body = b"<html>please sign in</html>" * 100 if fault == "page" else cls.data
        self.send_response(200)
        if fault != "cut, of no stated length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "stall":
            self.wfile.write(body[:600])
            time.sleep(3)
        elif fault == "drip":
            with contextlib.suppress(OSError):
                for byte in body[:60]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
        else:
            self.wfile.write(body[:3000] if "cut" in fault else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def quick(cache, monkeypatch):
    """A second of patience; nothing is waited for between attempts."""
    monkeypatch.setenv("DEIT_FETCH_SECONDS", "1")
    monkeypatch.setattr(fetch, "pause", lambda seconds: None)


FAULTS = ["hang up", "silence", "busy", "page", "stall", "drip", "cut", "cut, of no stated length"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("times", [1, 9])
def test_a_fault_on_the_way_is_tried_again_within_a_limit(tmp_path, cache, quick, fault, times):
    data = write(tmp_path / "x.tar", PAIR).read_bytes()
    handler = type("Handler", (Faulty,), {"data": data, "faults": (fault,) * times})
    with serving(handler) as name:
        if times == 1:
            assert contents(open_source(name, "train")) == [(10, 2), (20, 0)]
            assert handler.asked == 2
            return
        with pytest.raises(ValueError, match=r"data: http://.*train-0.tar: .* \(attempt 3 of 3\)"):
            open_source(name, "train")
        assert handler.asked == 3
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_shard_past_the_limit_of_bytes_is_not_fetched(tmp_path, cache, quick, monkeypatch):
    data = write(tmp_path / "x.tar", PAIR).read_bytes()
    monkeypatch.setenv("DEIT_MAX_SHARD_BYTES", "2000")
    for fault in ("none", "cut, of no stated length"):
        handler = type("Handler", (Faulty,), {"data": 2 * data, "faults": (fault,)})
        with serving(handler) as name:
            with pytest.raises(ValueError, match=r"train-0.tar: .*DEIT_MAX_SHARD_BYTES"):
                open_source(name, "train")
            assert handler.asked == 1


def test_a_server_that_is_not_there_is_named(cache, quick):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        name = f"wds:http://127.0.0.1:{taken.getsockname()[1]}/{{split}}.tar"
        with pytest.raises(ValueError, match=r"data: http://.*train.tar: .*refused"):
            open_source(name, "train")
