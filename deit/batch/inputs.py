"""What a collection is made of, as a stream: folders, files, globs, lists, shards.

Nothing here holds the collection: a folder of a million files is sorted through a temporary file,
a shard is scanned when its turn comes. The order is the same for every pass.
"""

from __future__ import annotations

import errno
import fnmatch
import heapq
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deit.data import fetch, shards, tars
from deit.data.decoding import SUFFIXES, UnreadableImage, check_size, is_image_name
from deit.data.limits import not_regular

_SHARD = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
_RANGE = re.compile(r"\{\d+\.\.\d+\}")
_MAGIC = re.compile(r"[*?[]")

# Entries of one folder that are sorted in memory; some MB of names.
SORTED_AT_ONCE = 1 << 16
_READ = 1 << 16  # bytes read of a sorted run at a time


@dataclass(frozen=True)
class Item:
    """One image to read: a file, or a member of a shard."""

    name: str  # in its row; of a member SHARD:MEMBER
    file: str
    offset: int = 0
    size: int | None = None  # bytes; None: the whole file

    def encoded(self) -> str | bytes:
        """What `Reader` takes: the file's path, or the member's bytes. Raises UnreadableImage."""
        if self.size is None:
            return self.file
        check_size(self.size, self.name)
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise UnreadableImage(self.name, f"{error.strerror} ({type(error).__name__})") from None
        if len(data) < self.size:
            raise UnreadableImage(self.name, "the shard was cut short since it was opened")
        return data


class Inputs:
    """The images of a collection, in the order in which it is given.

    Each of `given` is one of:

    - a folder: image files below it, sorted by name, links to folders followed;
    - a file, taken as an image whatever it is called; one called .tar, .tgz, .tar.gz, ... is a
      WebDataset shard: its image members in their order, labels left aside;
    - shards by number or from a server: "shards/{000..146}.tar", "https://..." (kept in the
      user's cache, `deit.data.fetch`);
    - a glob: all that it matches, sorted within each folder, each as if it were given. `**` stands
      for folders of any depth, and then folders that match are not entered a second time.

    `listed` is a text file that names one image file or shard a line; it is read as a stream, too.
    An image in it that is not there is an unreadable one. Iterating again starts afresh.
    """

    def __init__(self, given: Sequence[str | Path] = (), listed: str | Path | None = None) -> None:
        """Look whether all is there.

        Raises ValueError for nothing given, a path or shard that does not exist or is given twice,
        a glob that matches nothing, a folder without images or within another one, and an empty
        list. A shard that was cut short is found when its turn comes.
        """
        self.given = [os.fspath(each) for each in given]
        self.listed = None if listed is None else os.fspath(listed)
        if not self.given and self.listed is None:
            raise ValueError("images: expected files, folders, globs, shards or a list; got none")
        self._sources = [source for name in self.given for source in _sources(name)]
        _check_once(self._sources)
        if self.listed is not None and next(_lines(self.listed), None) is None:
            raise ValueError(f"list: no line in {self.listed}")

    def _parts(self) -> Iterator[tuple[str, str]]:
        """Shards, folders and files as they are met, by what they are."""
        for kind, name in self._sources:
            if kind != "glob":
                yield kind, name
                continue
            deep = "**" in name.split("/")
            for match in _matches(name):
                if not os.path.isdir(match):
                    yield ("shard" if _SHARD.search(match) else "file"), match
                elif not deep:
                    yield "folder", match
        for line in () if self.listed is None else _lines(self.listed):
            yield ("shard" if _is_remote(line) or _SHARD.search(line) else "file"), line

    def __iter__(self) -> Iterator[Item]:
        """Raises ValueError for a shard that does not come or is not whole, OSError for a folder
        that may not be read."""
        for kind, name in self._parts():
            if kind == "shard":
                yield from _members(name)
            elif kind == "folder":
                yield from (Item(path, path) for path in _below(name, ()))
            else:
                yield Item(name, name)

    def count(self) -> tuple[int, int]:
        """How many image files there are, and how many shards, by another pass; opens no shard."""
        images = found = 0
        for kind, name in self._parts():
            if kind == "shard":
                found += 1
            else:
                images += sum(1 for _ in _below(name, ())) if kind == "folder" else 1
        return images, found

    def about(self) -> dict[str, object]:
        """What was given, as JSON; where a name may be relative, of which folder."""
        fixed = all(_is_remote(name) or os.path.isabs(name) for name in self.given)
        here = None if fixed and self.listed is None else os.getcwd()
        return {"images": self.given, "list": self.listed, "relative_to": here}

    def check_apart(self, out: str | Path) -> None:
        """Raises ValueError where a glob would find what is written into the folder `out`."""
        inside = os.path.realpath(out)
        for kind, name in self._sources:
            if kind != "glob":
                continue
            above = os.path.realpath(_fixed(name))
            parts = [part for part in name.split("/") if part not in ("", ".")]
            first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
            for made in ("_run.json", "piece-000000.parquet"):
                path = os.path.relpath(os.path.join(inside, made), above).split("/")
                if path[0] != ".." and _fits(path, parts[first:]):
                    raise ValueError(
                        f"images: {name} takes in what is written into {out}: end it as the "
                        "images' names do, or give another folder"
                    )


def _sources(name: str) -> Iterator[tuple[str, str]]:
    """What an argument is, and its name; of a range each. Raises ValueError where nothing is."""
    if os.path.isdir(name):
        if next(_below(name, ()), None) is None:
            known = " ".join(sorted(SUFFIXES))
            raise ValueError(
                f"images: no image file in folder {name} (looked for {known}; shards are given "
                "as 'FOLDER/*.tar')"
            )
        yield "folder", name
    elif os.path.exists(name):
        yield ("shard" if _SHARD.search(name) else "file"), name
    elif _is_remote(name) or _RANGE.search(name):
        for shard in shards.expand(name):
            if not _is_remote(shard) and not os.path.exists(shard):
                raise ValueError(f"images: no such shard: {shard}")
            yield "shard", shard
    elif not _MAGIC.search(name):
        raise ValueError(f"images: no such file or folder: {name}")
    else:
        if name.split("/").count("**") > 1:
            raise ValueError(f"images: expected ** once in a glob; got {name}")
        if next(_matches(name), None) is None:
            raise ValueError(f"images: nothing matches {name}")
        yield "glob", name


def _check_once(sources: Sequence[tuple[str, str]]) -> None:
    """Refuses what is given twice, and what lies in a folder that is given."""
    folders = {os.path.realpath(name): name for kind, name in sources if kind == "folder"}
    seen: set[str] = set()
    for kind, name in sources:
        if (path := name if _is_remote(name) else os.path.abspath(name)) in seen:
            raise ValueError(f"images: {name} is given twice")
        seen.add(path)
        if kind == "shard":
            continue
        above = os.path.realpath(_fixed(name) if kind == "glob" else name)
        if kind != "glob":
            above = os.path.dirname(above)
        while True:
            if above in folders:
                raise ValueError(
                    f"images: {name} is in {folders[above]}: its images would come twice"
                )
            if above == os.path.dirname(above):
                break
            above = os.path.dirname(above)


def _is_remote(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _members(name: str) -> Iterator[Item]:
    """The images of a shard, once all its headers were found whole."""
    path = fetch.local(name)
    try:
        with open(path, "rb") as file:
            for member, place in tars.members(file, wanted=is_image_name):
                yield Item(f"{name}:{member}", str(path), place.offset, place.size)
    except (OSError, ValueError) as error:
        raise ValueError(f"images: {name}: {error}") from error


def _lines(path: str) -> Iterator[str]:
    what = not_regular(Path(path))
    if what is not None:
        raise ValueError(f"list: expected a regular file; got {what}, {path}")
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in file:  # "\n" alone ends it: a name may hold "\r"
            name = line.rstrip("\r\n")
            if name:
                yield name


# ---- folders


def _below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Image files below a folder; `above`: the folders that it is in, by device and inode."""
    about = os.stat(folder)
    own = about.st_dev, about.st_ino
    if own in above:
        return
    for name, is_folder in entries(folder):
        path = os.path.join(folder, name)
        if is_folder:
            yield from _below(path, (*above, own))
        elif is_image_name(name):
            yield path


def entries(folder: str) -> Iterator[tuple[str, bool]]:
    """A folder's names in sorted order, and whether each is a folder; memory for some of them."""
    run: list[bytes] = []
    runs: list[tuple[int, int]] = []
    spill: IO[bytes] | None = None
    try:
        with os.scandir(folder) as found:
            for entry in found:
                kind = b"/" if _is_folder(entry) else b"."
                run.append(os.fsencode(entry.name) + b"\0" + kind)
                if len(run) == SORTED_AT_ONCE:
                    spill = spill or tempfile.TemporaryFile()  # noqa: SIM115
                    runs.append(_write(spill, run))
                    run = []
        run.sort()
        every = heapq.merge(run, *(_run(spill.fileno(), *each) for each in runs)) if spill else run
        for record in every:
            yield os.fsdecode(record[:-2]), record[-1:] == b"/"
    finally:
        if spill is not None:
            spill.close()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link that leads nowhere is a file, which will be unreadable; so is one to what may not be
    looked at, where it is called like an image."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP and not is_image_name(entry.name):
            raise
        return False


def _write(spill: IO[bytes], run: list[bytes]) -> tuple[int, int]:
    run.sort()
    data = b"".join(record + b"\0" for record in run)
    start = spill.tell()
    spill.write(data)
    spill.flush()
    return start, start + len(data)


def _run(descriptor: int, at: int, end: int) -> Iterator[bytes]:
    """The records of a sorted run: NAME, NUL, kind, NUL."""
    rest = b""
    while at < end:
        data = os.pread(descriptor, min(_READ, end - at), at)
        at += len(data)
        *fields, rest = (rest + data).split(b"\0")
        if len(fields) % 2:
            rest = fields.pop() + b"\0" + rest
        for name, kind in zip(fields[::2], fields[1::2], strict=True):
            yield name + b"\0" + kind


# ---- globs


def _fixed(pattern: str) -> str:
    """The folder that all matches of a glob are in."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")


def _matches(pattern: str) -> Iterator[str]:
    """What a glob matches, sorted within each folder. Python's own lists a folder before it gives
    the first name."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    return _expand("/" if pattern.startswith("/") else "", parts)


def _fits(path: list[str], parts: list[str]) -> bool:
    """Whether a file's path is what `_expand` would find."""
    if not path or not parts:
        return not path and not parts
    if parts[0] != "**":
        return _named(path[0], parts[0]) and _fits(path[1:], parts[1:])
    rest = parts[1:] or ["*"]
    return _fits(path, rest) or (path[0][0] != "." and _fits(path[1:], parts))


def _named(name: str, part: str) -> bool:
    hidden = name.startswith(".") and not part.startswith(".")
    return not hidden and fnmatch.fnmatchcase(name, part)


def _expand(folder: str, parts: list[str]) -> Iterator[str]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        rest = rest or ["*"]
        yield from _expand(folder, rest)
        for name, is_folder in entries(folder or "."):
            path = os.path.join(folder, name)
            if is_folder and not name.startswith(".") and not os.path.islink(path):
                yield from _expand(path, [part, *rest])
        return
    if not _MAGIC.search(part):
        path = os.path.join(folder, part)
        if rest and os.path.isdir(path):
            yield from _expand(path, rest)
        elif not rest and os.path.exists(path):
            yield path
        return
    for name, is_folder in entries(folder or "."):
        if not _named(name, part):
            continue
        path = os.path.join(folder, name)
        if not rest:
            yield path
        elif is_folder:
            yield from _expand(path, rest)
