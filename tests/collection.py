"""Collections of real photographs, small, and a network for them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import skimage.data
import sklearn.datasets
import small
from PIL import Image, ImageOps

from deit.weights.checkpoint import save

_NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def photographs() -> list[Image.Image]:
    """Six, of scikit-image and scikit-learn, at 160 x 120 pixels."""
    arrays = [getattr(skimage.data, name)()[..., :3] for name in _NAMES]
    arrays += sklearn.datasets.load_sample_images().images
    return [ImageOps.fit(Image.fromarray(array), (160, 120)) for array in arrays]


def encoded(count: int) -> list[bytes]:
    """JPEGs that all differ: the photographs, each time at another quality."""
    photos, found = photographs(), []
    for number in range(count):
        file = io.BytesIO()
        photos[number % len(photos)].save(file, "JPEG", quality=95 - number // len(photos) % 60)
        found.append(file.getvalue())
    return found


def folder(path: Path, count: int, *, bad: tuple[int, ...] = ()) -> Path:
    """`count` photographs in two levels; those of `bad` are cut short."""
    for number, data in enumerate(encoded(count)):
        inside = path / f"{number % 3}"
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"{number:04d}.jpg").write_bytes(data[:300] if number in bad else data)
    return path


def shard(path: Path, images: list[bytes], label: bool = True) -> Path:
    """A WebDataset shard."""
    with tarfile.open(path, "w") as archive:
        for number, data in enumerate(images):
            for name, content in ((f"{number:04d}.jpg", data), (f"{number:04d}.cls", b"3")):
                if label or name.endswith("jpg"):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return path


def weights(path: Path, settings=small.SMALL) -> Path:
    """Of a network of two blocks at 64 px."""
    save(small.network(settings), path)
    return path


def rows(folder: str | os.PathLike) -> list[dict]:
    """What pieces hold, in their order."""
    import pyarrow.parquet as pq

    found = []
    for piece in sorted(Path(folder).glob("piece-*.parquet")):
        found += pq.read_table(piece).to_pylist()
    return found


def same_bytes(folder: Path) -> dict[str, bytes]:
    """The pieces by their names."""
    return {piece.name: piece.read_bytes() for piece in folder.glob("piece-*.parquet")}
