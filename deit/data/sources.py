"""Where labelled images come from: folders, Fashion-MNIST, shards, Hugging Face datasets.

A source is a list: its length is known and any image can be read by its index, which is what
makes the order of training a function of the seed (see sampling.py).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from deit.data.decoding import find_images, load_image
from deit.data.hub import HubDataset
from deit.data.images import IMAGENET_MEAN, IMAGENET_STD
from deit.data.shards import Shards

# The Debian package dataset-fashion-mnist puts its files here; torchvision below <root>.
FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist",)
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# Of its 60,000 training images, scaled to [0, 1].
FASHION_MEAN, FASHION_STD = (0.2860,) * 3, (0.3530,) * 3
IDX_BYTES = 1 << 30  # of an IDX file's data; Fashion-MNIST's largest has 47 MB


class Source(Protocol):
    """Labelled images by index."""

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def labels(self) -> Sequence[int] | np.ndarray:
        """Of every image."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a user would look for: a file's path, or a number in a set."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and its class; raises `deit.data.images.UnreadableImage`."""


def check_labels(source: Source) -> None:
    """Raises ValueError where an image's label is none of the classes: -1 marks those without."""
    labels = np.asarray(source.labels)
    bad = np.flatnonzero((labels < 0) | (labels >= len(source.classes)))
    if len(bad):
        raise ValueError(
            f"data: expected labels from 0 to {len(source.classes) - 1}; {len(bad)} of "
            f"{len(labels)} images have another, such as {source.name(int(bad[0]))} with label "
            f"{labels[bad[0]]} (-1: unlabelled)"
        )


@dataclass
class Folder:
    """One folder a class, images anywhere below it, as torchvision's ImageFolder has it."""

    paths: list[Path]
    labels: list[int]
    classes: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def open(cls, root: Path, classes: tuple[str, ...] | None = None) -> Folder:
        """Read the names below `root`; `classes` fixes the classes (the training set's).

        Raises ValueError for no folder, no class, an empty class, or one not among `classes`.
        """
        if not root.is_dir():
            raise ValueError(f"data: expected a folder with one folder a class; got {root}")
        found = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "."))
        if not found:
            raise ValueError(f"data: no class folders in {root}")
        classes = found if classes is None else classes
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise ValueError(f"data: {root} has classes that training has not: {unknown[:5]}")
        paths, labels = [], []
        for name in found:
            inside = find_images(root / name)
            paths += inside
            labels += [classes.index(name)] * len(inside)
        return cls(paths, labels, classes)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.paths[index]), self.labels[index]


@dataclass
class FashionMnist:
    """Fashion-MNIST (arXiv 1708.07747): 28 x 28 grey images of clothes, ten classes."""

    images: np.ndarray  # [n, 28, 28] uint8
    labels: np.ndarray  # [n] uint8
    split: str
    classes: tuple[str, ...] = FASHION_CLASSES
    mean: tuple[float, ...] = FASHION_MEAN
    std: tuple[float, ...] = FASHION_STD

    @classmethod
    def open(cls, root: Path, split: str) -> FashionMnist:
        """Read the four IDX files of `root`, gzipped or not."""
        prefix = {"train": "train", "val": "t10k"}[split]
        images = _read_idx(root, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(root, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise ValueError(f"data: {root}: {len(images)} images and {len(labels)} labels")
        return cls(images, labels, split)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"fashion-mnist/{self.split}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


def _read_idx(root: Path, name: str, dimensions: int) -> np.ndarray:
    """An IDX file: two zero bytes, the type (8: uint8), the dimensions, each size, the data."""
    path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"data: expected {name}[.gz] in {root}")
    header = 4 * (1 + dimensions)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic, *sizes = struct.unpack(f">{1 + dimensions}I", file.read(header))
            if magic != 0x800 + dimensions or (count := math.prod(sizes)) > IDX_BYTES:
                raise ValueError(f"sizes {sizes}")
            data = file.read(count + 1)  # a byte too many is damage, too
            if len(data) != count:
                raise ValueError(f"{len(data)} bytes for {count}")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(
            f"data: {path} is damaged or no IDX file of {dimensions} dimensions ({error})"
        ) from error
    return np.frombuffer(data, np.uint8).reshape(sizes)


def _fashion_root(root: str | None) -> Path:
    places = [root] if root else [*FASHION_FOLDERS, "data/FashionMNIST/raw"]
    for place in map(Path, places):
        for folder in (place, place / "FashionMNIST" / "raw"):
            if any(folder.glob("train-images-idx3-ubyte*")):
                return folder
    raise ValueError(
        f"data: no Fashion-MNIST in {', '.join(map(str, places))}; install the Debian package "
        "dataset-fashion-mnist, or name a folder: fashion-mnist:FOLDER"
    )


def _numbers(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Names of as many classes in a source that names none, as shards are."""
    return tuple(map(str, range(len(classes))))


def open_source(
    name: str, split: str, classes: tuple[str, ...] | None = None, limit: int | None = None
) -> Source:
    """The images that `name` means.

    Args:
        name: a folder holding `train` and `val` (each with one folder a class);
            "fashion-mnist[:FOLDER]"; "wds:PATTERN", WebDataset shards with {split} in their
            path or URL and ranges as {000..146}; "hf:NAME", a Hugging Face dataset.
        split: "train" or "val".
        classes: those that labels are to count in: the training split's, or a network's.
        limit: take this many images, evenly spread over the source; None for all.

    Raises:
        ValueError: nothing there, or not in the layout expected, or past a limit of
            `deit.data.limits`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split: expected 'train' or 'val'; got {split!r}")
    kind, _, rest = name.partition(":")
    if kind == "fashion-mnist":
        source: Source = FashionMnist.open(_fashion_root(rest or None), split)
    elif kind == "wds":
        if "{split}" not in rest:
            raise ValueError(f"data: expected {{split}} (train or val) in {rest!r}")
        source = Shards(rest.replace("{split}", split), classes)
    elif kind == "hf":
        source = HubDataset(rest, split)
    else:
        source = Folder.open(Path(name) / split, classes)
    if classes is not None and source.classes != classes and classes != _numbers(classes):
        raise ValueError(
            f"data: expected the classes {', '.join(classes[:5])}, ... ({len(classes)} in all); "
            f"{name} has {', '.join(source.classes[:5])}, ... ({len(source.classes)})"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1; got {limit}")
    return source if limit is None or limit >= len(source) else Subset(source, limit)


class Subset:
    """`count` images of a source, evenly spread (a source sorted by class keeps its shares)."""

    def __init__(self, source: Source, count: int) -> None:
        self.source = source
        self.indices = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
        self.classes, self.mean, self.std = source.classes, source.mean, source.std
        self.labels = np.asarray(source.labels)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.source.read(self.indices[index])
