"""Where a tar's members lie, by tarfile's reading of its headers, and whether it is all there.

tarfile takes the end of a file, or a damaged header, for the end of the tar, as long as it is not
the first one. So a copy that ended early has fewer members, and nobody is told. Here it is an
error.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

BLOCK = 512  # bytes: a tar is a sequence of these

# Where a second tar would follow the first one's end: GNU tar fills its last 20 blocks with zeros.
_PADDING = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


def members(file: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Place]]:
    """The files in a tar that are `wanted` by their names, in order; `file` may be read between.

    A link within the tar, hard or symbolic, is the file that it leads to.

    Raises ValueError: no tar, damaged, cut short, or a wanted member is neither file nor link.
    """
    try:
        found, places = _scan(file, wanted)
    except (tarfile.TarError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{error or type(error).__name__}") from error
    for name, target in found:
        place = places.get(target) if isinstance(target, str) else target
        if place is None:
            raise ValueError(f"{name} is a link to {target}, which is no file of this tar")
        yield name, place


def _scan(
    file: BinaryIO, wanted: Callable[[str], bool]
) -> tuple[list[tuple[str, Place | str]], dict[str, Place]]:
    """The wanted members, a link as the name that it leads to, and all files by their names."""
    size = file.seek(0, 2)
    file.seek(0)
    found: list[tuple[str, Place | str]] = []
    places: dict[str, Place] = {}
    bounded: Any = _Bounded(file)
    archive: Any
    with tarfile.open(fileobj=bounded, mode="r:") as archive:
        for member in archive:
            archive.members = []  # it would keep them all
            name, end = member.name, member.offset_data + member.size
            if member.size < 0 or (member.isreg() and end > size):
                raise ValueError(f"cut short or damaged in {name}: {size} of {end} bytes")
            if member.isreg() and not member.issparse():
                place = Place(member.offset_data, member.size)
                places[posixpath.normpath(name)] = place
                if wanted(name):
                    found.append((name, place))
            elif wanted(name) and (member.islnk() or member.issym()):
                above = posixpath.dirname(name) if member.issym() else ""
                found.append((name, posixpath.normpath(posixpath.join(above, member.linkname))))
            elif wanted(name) and not member.isdir():
                raise ValueError(f"{name} is no plain file (tar type {member.type!r})")
        _check_end(file, archive.offset)
    return found, places


class _Bounded:
    """What tarfile reads headers from.

    It takes a long name whole, of any size that a header states; no path has a MiB.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 1 << 20:
            raise ValueError(f"a header of {size} bytes")
        return self.file.read(size)


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raises ValueError where a tar does not end at `offset` with a block of zeros."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise ValueError(f"cut short after {offset + len(block)} bytes: its end is missing")
    if any(block):
        raise ValueError(f"damaged at byte {offset}: neither a member's header nor the end")
    if any(file.read(_PADDING)):
        raise ValueError(f"more follows its end at byte {offset}, as where tars were joined by cat")


def is_tar(start: bytes) -> bool:
    """Whether a file that begins so is a tar: its first header's checksum holds, or it is empty."""
    block = start[:BLOCK]
    if len(block) < BLOCK:
        return False
    if not any(block):
        return True
    try:
        stated = int(block[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    return stated in (sum(rest), sum(byte - 256 * (byte > 127) for byte in rest))
