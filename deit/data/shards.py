"""WebDataset shards: tar files whose members `KEY.jpg` and `KEY.cls` make one sample.

Shards are indexed once (names, offsets and labels, no pixels) and then read at random, so that
they are a list like any other source. Remote and compressed shards become plain files in a folder
of the user's cache (see fetch.py).

A shard that cannot give all its samples is refused when it is opened: one that was cut short, a
key or a key's image twice, an image without a label or a label without an image.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from deit.data import fetch, tars
from deit.data.decoding import UnreadableImage, check_size, is_image_name, load_image
from deit.data.images import IMAGENET_MEAN, IMAGENET_STD
from deit.data.limits import limit
from deit.data.tars import Place

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LABEL = re.compile(rb"\s*(\d+)\s*")
_LABEL_BYTES = 64  # of a KEY.cls; the largest label has 6 digits


@dataclass(frozen=True)
class _Member:
    shard: int
    offset: int
    size: int
    label: int
    key: str


class Shards:
    """Samples of one split. A label is the integer in `KEY.cls`."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __init__(self, pattern: str, classes: tuple[str, ...] | None = None) -> None:
        """`pattern`: a path or URL; {000..146} counts, keeping the zeros.

        Raises ValueError for no shard, one that does not come or is no whole tar, a sample without
        an image or a label or with two, or a label outside `classes`.
        """
        self.names = expand(pattern)
        self.paths = [fetch.local(name) for name in self.names]
        self.members: list[_Member] = []
        for number, (name, path) in enumerate(zip(self.names, self.paths, strict=True)):
            kept = name if str(path) == name else f"{name} (kept as {path})"
            self.members += _index(number, path, kept)
        if not self.members:
            raise ValueError(f"data: no image in the shards of {pattern}")
        self.labels = np.array([member.label for member in self.members])
        count = int(self.labels.max()) + 1
        if count > (most := limit("DEIT_MAX_CLASSES")):
            raise ValueError(f"data: {pattern} has label {count - 1}; DEIT_MAX_CLASSES is {most}")
        self.classes = tuple(map(str, range(count))) if classes is None else classes
        if count > len(self.classes):
            raise ValueError(f"data: {pattern} has label {count - 1}, beyond training's classes")

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        member = self.members[index]
        return f"{self.names[member.shard]}:{member.key}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        member = self.members[index]
        check_size(member.size, self.name(index))
        with open(self.paths[member.shard], "rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        if len(data) < member.size:
            raise UnreadableImage(self.name(index), "the shard was cut short since it was opened")
        return load_image(data, self.name(index)), member.label


def expand(pattern: str) -> list[str]:
    """Every name that a pattern with {000..146} stands for.

    Raises ValueError for a range that counts down, and more names than DEIT_MAX_SHARDS.
    """
    choices, count, most = [], 1, limit("DEIT_MAX_SHARDS")
    for first, last in _RANGE.findall(pattern):
        if max(len(first), len(last)) > 18:
            raise ValueError(f"data: expected a range of small numbers; got {pattern[:80]}")
        if int(last) < int(first):
            raise ValueError(f"data: expected a range that counts up; got {first}..{last}")
        numbers = range(int(first), int(last) + 1)
        count *= len(numbers)
        if count > most:
            raise ValueError(
                f"data: {pattern} stands for {count} shards or more; DEIT_MAX_SHARDS is {most}"
            )
        choices.append([f"{n:0{len(first)}d}" for n in numbers])
    template = _RANGE.sub("\0", pattern)
    names = []
    for chosen in itertools.product(*choices):
        name = template
        for number in chosen:
            name = name.replace("\0", number, 1)
        names.append(name)
    return names


def _index(number: int, path: Path, name: str) -> list[_Member]:
    """The samples of a shard. Raises ValueError where some may be missing, or are ambiguous."""
    images: dict[str, Place] = {}
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for member, place in tars.members(file, wanted=_is_part):
                key, _, suffix = member.rpartition(".")
                is_label = suffix.lower() == "cls"
                if key in (labels if is_label else images):
                    raise ValueError(f"{key} has two {'labels' if is_label else 'images'}")
                if is_label:
                    labels[key] = _read_label(file, place, member)
                else:
                    images[key] = place
    except (OSError, ValueError) as error:
        raise ValueError(f"data: {name}: {error}") from error
    if missing := [key for key in images if key not in labels]:
        raise ValueError(f"data: {name}: no label ({missing[0]}.cls) for {len(missing)} images")
    if missing := [key for key in labels if key not in images]:
        raise ValueError(f"data: {name}: no image for {len(missing)} labels ({missing[0]}.cls)")
    return [
        _Member(number, place.offset, place.size, labels[key], key) for key, place in images.items()
    ]


def _is_part(name: str) -> bool:
    """Whether a member is an image or a label; macOS's "._" files are neither."""
    base = name.rpartition("/")[2]
    return is_image_name(name) or (base[-4:].lower() == ".cls" and not base.startswith("._"))


def _read_label(file: BinaryIO, place: Place, name: str) -> int:
    file.seek(place.offset)
    text = file.read(min(place.size, _LABEL_BYTES))
    found = _LABEL.fullmatch(text)
    if found is None or place.size > _LABEL_BYTES or len(found[1]) > 18:
        raise ValueError(f"{name}: expected a label, a whole number from 0; got {text[:40]!r}")
    return int(found[1])
