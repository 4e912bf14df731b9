"""Shards as plain tar files here: remote ones fetched, compressed ones decompressed, each once.

Both go to a folder of the user's cache, whole or not at all. A shard that does not come is an error
with its name and the reason, after as many attempts as `deit.data.limits` says.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import http.client
import itertools
import lzma
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from deit.data import tars
from deit.data.limits import limit, not_regular

_PIECE = 1 << 20  # bytes read at a time
pause = time.sleep

# The first bytes of compressed files, and what reads them.
_COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": None,  # zstd
    b"\x04\x22\x4d\x18": None,  # lz4
}
_DAMAGE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, http.client.HTTPException)


class _ForGood(ValueError):
    """Past a limit: another attempt would end the same way."""


def local(name: str) -> Path:
    """The shard called `name`, a path or URL, as a plain tar file here.

    Raises ValueError with the name and the reason where there is none.
    """
    remote = name.startswith(("http://", "https://"))
    try:
        path = _fetched(name) if remote else Path(name)
        what = not_regular(path)
        if what is not None:
            raise ValueError(f"expected a regular file; got {what}")
        return _plain(path)
    except _DAMAGE as error:
        raise ValueError(f"data: {name}: {error}") from error


def _cached(key: str, name: str) -> Path:
    """Where the cache keeps what `key` stands for, under the end of its own name."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
    return home / "fused-deit" / "shards" / digest / (name[-100:] or "shard.tar")


@contextmanager
def _making(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---- compressed


def _plain(path: Path) -> Path:
    """The file itself, or what it holds where it is compressed, whatever it is called."""
    with open(path, "rb") as file:
        start = file.read(tars.BLOCK)
    opener = _opener(start)
    if opener is None:
        return path
    about = os.stat(path)
    key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    made = _cached(key, f"{path.name}.tar")
    if made.exists():
        return made
    most, what = limit("DEIT_MAX_SHARD_BYTES"), "DEIT_MAX_SHARD_BYTES"
    ratio = limit("DEIT_MAX_SHARD_RATIO") * max(about.st_size, 1 << 16)
    if ratio < most:
        most, what = ratio, "DEIT_MAX_SHARD_RATIO"
    with opener(path) as packed, _making(made) as file:
        _copy(iter(lambda: packed.read(_PIECE), b""), file, most, what)
    return made


def _opener(start: bytes) -> Any:
    """What decompresses a file that begins so; None where nothing has to.

    Raises ValueError for a kind that Python's own library does not read.
    """
    for magic, opener in _COMPRESSED.items():
        if start.startswith(magic):
            if opener is None:
                raise ValueError("expected a tar, plain or as gz, bz2 or xz; got zstd or lz4")
            return opener
    return None


def _copy(pieces: Iterable[bytes], file: BinaryIO, most: int, what: str) -> int:
    """Write `pieces`; returns how many bytes they were. Raises _ForGood beyond `most`."""
    done = 0
    for piece in pieces:
        done += len(piece)
        if done > most:
            raise _ForGood(f"more than {most} bytes, which is what {what} allows")
        file.write(piece)
    return done


# ---- remote


def _fetched(url: str) -> Path:
    """A remote shard in the cache."""
    path = _cached(url, re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2]))
    tries = limit("DEIT_FETCH_TRIES")
    for number in range(tries):
        if path.exists():
            return path
        try:
            with _making(path) as file:
                _fetch(url, file)
        except _DAMAGE as error:
            if number == tries - 1 or _is_final(error):
                attempts = f" (attempt {number + 1} of {tries})" if number else ""
                raise ValueError(f"{error or type(error).__name__}{attempts}") from error
            pause(min(2**number, 30))
    return path


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would end so too: a server's refusal, a full disk here."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 425, 429)
    of_disk = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    return (
        isinstance(error, (_ForGood, http.client.InvalidURL))
        or getattr(error, "errno", None) in of_disk
    )


def _fetch(url: str, file: BinaryIO) -> None:
    """One attempt. Raises OSError, ValueError or HTTPException."""
    patience, most = limit("DEIT_FETCH_SECONDS"), limit("DEIT_MAX_SHARD_BYTES")
    with urllib.request.urlopen(url, timeout=patience) as answer:
        length = answer.headers.get("Content-Length", "")
        expected = int(length) if length.isascii() and length.isdigit() else None
        _check_room(expected, most, Path(file.name).parent)
        pieces, start = _steady(answer, patience), b""
        while len(start) < tars.BLOCK and (piece := next(pieces, b"")):
            start += piece
        if not tars.is_tar(start) and _opener(start) is None:
            kind = answer.headers.get("Content-Type", "no type")
            raise ValueError(f"expected a tar; got {kind} that begins {start[:40]!r}")
        if not any(start):  # an empty tar; a file that goes on with zeros is no tar
            most = min(most, 1 << 20)
        done = _copy(itertools.chain([start], pieces), file, most, "DEIT_MAX_SHARD_BYTES")
    if expected is not None and done != expected:
        raise OSError(f"the connection broke off after {done} of {expected} bytes")
    if expected is None:  # nothing but the tar itself says whether this is all of it
        file.flush()
        _check_whole(Path(file.name), _opener(start) or open)


def _check_room(expected: int | None, most: int, folder: Path) -> None:
    if expected is None:
        return
    if expected > most:
        raise _ForGood(f"{expected} bytes, where DEIT_MAX_SHARD_BYTES={most} allows fewer")
    free = shutil.disk_usage(folder).free
    if expected > free:
        raise _ForGood(f"{expected} bytes, where {folder} has room for {free}")


def _check_whole(path: Path, opener: Any) -> None:
    with opener(path, "rb") as file:
        for _ in tars.members(file, wanted=lambda name: False):
            pass


def _steady(answer: Any, patience: int) -> Iterator[bytes]:
    """What a server sends, as long as every 64 KiB, or the end, come within `patience` seconds.

    A socket's own timeout asks for one byte in that time, so a server could drip for ever.
    """
    got, since = 0, time.monotonic()
    while piece := answer.read1(_PIECE):
        yield piece
        got += len(piece)
        now = time.monotonic()
        if got >= 1 << 16:
            got, since = 0, now
        elif now - since > patience:
            raise TimeoutError(f"stalled: {got} bytes in {now - since:.0f} s")
