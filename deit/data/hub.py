"""Hugging Face datasets: a name on the Hub, or a folder that `save_to_disk` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from deit.images import IMAGENET_MEAN, IMAGENET_STD, UnreadableImage, to_rgb

_SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}
_IMAGES, _LABELS = ("image", "img"), ("label", "labels", "fine_label")


class HubDataset:
    """One split of a dataset with an image and a label column."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __init__(self, name: str, split: str) -> None:
        """Raises ValueError for a missing package, split or column."""
        try:
            import datasets
        except ImportError:
            raise ValueError(
                "data: Hugging Face datasets need the package datasets (pip install datasets)"
            ) from None
        found: Any = (
            datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
        )
        self.title = f"hf:{name}"
        self.rows = found[_one_of(_SPLITS[split], found, f"{name}: split")]
        self.image = _one_of(_IMAGES, self.rows.features, f"{name}: image column")
        self.label = _one_of(_LABELS, self.rows.features, f"{name}: label column")
        feature = self.rows.features[self.label]
        if not hasattr(feature, "names"):
            raise ValueError(f"data: {name}: column {self.label} has no class names")
        self.classes = tuple(feature.names)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.title}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            row = self.rows[index]
            return to_rgb(row[self.image], self.name(index)), int(row[self.label])
        except UnreadableImage:
            raise
        except Exception as error:  # the package decodes with Pillow: any of its errors
            raise UnreadableImage(self.name(index), f"{error} ({type(error).__name__})") from error


def _one_of(names: tuple[str, ...], there: Any, what: str) -> str:
    for name in names:
        if name in there:
            return name
    raise ValueError(f"data: {what}: expected one of {', '.join(names)}; got {', '.join(there)}")
