"""WebDataset shards: tar files whose members `KEY.jpg` and `KEY.cls` make one sample.

Shards are indexed once (names, offsets and labels, no pixels) and then read at random, so that
they are a list like any other source. Remote shards are fetched whole, once, into a folder
of the user's cache.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from deit.images import IMAGENET_MEAN, IMAGENET_STD, SUFFIXES, load_image

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


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

        Raises ValueError for no shard, a file that is no tar, a sample without a label, or a label
        outside `classes`.
        """
        self.paths = [_fetched(name) for name in expand(pattern)]
        self.members = [m for n, path in enumerate(self.paths) for m in _index(n, path)]
        if not self.members:
            raise ValueError(f"data: no image in the shards of {pattern}")
        count = max(member.label for member in self.members) + 1
        self.classes = tuple(map(str, range(count))) if classes is None else classes
        if count > len(self.classes):
            raise ValueError(f"data: {pattern} has label {count - 1}, beyond training's classes")

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        member = self.members[index]
        return f"{self.paths[member.shard]}:{member.key}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        member = self.members[index]
        with open(self.paths[member.shard], "rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        return load_image(io.BytesIO(data), self.name(index)), member.label


def expand(pattern: str) -> list[str]:
    """Every name that a pattern with {000..146} stands for.

    Raises ValueError for a range that counts down.
    """
    choices = []
    for first, last in _RANGE.findall(pattern):
        if int(last) < int(first):
            raise ValueError(f"data: expected a range that counts up; got {first}..{last}")
        choices.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
    template = _RANGE.sub("\0", pattern)
    names = []
    for numbers in itertools.product(*choices):
        name = template
        for number in numbers:
            name = name.replace("\0", number, 1)
        names.append(name)
    return names


def _index(number: int, path: Path) -> list[_Member]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stem, _, suffix = member.name.rpartition(".")
                if not member.isfile():
                    continue
                if f".{suffix.lower()}" in SUFFIXES:
                    images[stem] = member
                elif suffix == "cls":
                    file = archive.extractfile(member)
                    labels[stem] = int(file.read()) if file else -1
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"data: {path}: {error}") from error
    missing = [key for key in images if labels.get(key, -1) < 0]
    if missing:
        raise ValueError(f"data: {path}: no label ({missing[0]}.cls) for {len(missing)} images")
    return [
        _Member(number, member.offset_data, member.size, labels[key], key)
        for key, member in images.items()
    ]


def _fetched(name: str) -> Path:
    """The shard as a file here; a URL's is fetched into the cache, whole or not at all."""
    if not name.startswith(("http://", "https://")):
        return Path(name)
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = home / "fused-deit" / "shards" / hashlib.sha256(name.encode()).hexdigest()[:16]
    path = folder / name.rpartition("/")[2]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            urllib.request.urlretrieve(name, partial)
            os.replace(partial, path)
        except OSError as error:
            raise ValueError(f"data: {name}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return path
