"""Hugging Face datasets: a name on the Hub, or a folder that `save_to_disk` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit.data.decoding import UnreadableImage, load_image
from deit.data.images import IMAGENET_MEAN, IMAGENET_STD
from deit.data.limits import limit

_SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}
_IMAGES, _LABELS = ("image", "img"), ("label", "labels", "fine_label")


class HubDataset:
    """One split of a dataset with an image and a label column.

    The package would decode whatever Pillow knows, and Pillow hands EPS to Ghostscript. So it gives
    out each image's bytes or file here, and `load_image` decodes those, as it does anywhere.
    """

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
        if not isinstance(found, datasets.DatasetDict):
            raise ValueError(
                f"data: {name}: expected a DatasetDict, with splits; got a {type(found).__name__}"
            )
        self.title = f"hf:{name}"
        rows = found[_one_of(_SPLITS[split], found, f"{name}: split")].with_format(None)
        self.image = _one_of(_IMAGES, rows.features, f"{name}: image column")
        self.label = _one_of(_LABELS, rows.features, f"{name}: label column")
        if not isinstance(rows.features[self.image], datasets.Image):
            kind = type(rows.features[self.image]).__name__
            raise ValueError(f"data: {name}: column {self.image}: expected Image; got {kind}")
        feature = rows.features[self.label]
        if not hasattr(feature, "names"):
            raise ValueError(f"data: {name}: column {self.label} has no class names")
        self.classes = tuple(feature.names)
        labels = rows.select_columns([self.label])[:][self.label]
        self.labels = np.array([-1 if label is None else label for label in labels], np.int64)
        # A row's other columns are not read at all, even where they are images.
        self.rows = rows.select_columns([self.image]).cast_column(
            self.image, datasets.Image(decode=False)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.title}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            row = self.rows[index][self.image]
            if row is None:
                raise UnreadableImage(self.name(index), "a row without an image")
            image = self._decode(row["bytes"], row["path"], self.name(index))
            return image, int(self.labels[index])
        except UnreadableImage:
            raise
        except Exception as error:  # of the package's own files
            raise UnreadableImage(self.name(index), f"{error} ({type(error).__name__})") from error

    def _decode(self, data: bytes | None, path: str | None, name: str) -> Image.Image:
        """From the bytes in the row, or the file or URL that it names."""
        if data is not None:
            return load_image(data, name)
        if path is None:
            raise UnreadableImage(name, "neither bytes nor a file's name")
        if "://" not in path:
            return load_image(path)
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:  # one byte past the limit, so that it is refused
            return load_image(file.read(limit("DEIT_MAX_IMAGE_BYTES") + 1), name)


def _one_of(names: tuple[str, ...], there: Any, what: str) -> str:
    for name in names:
        if name in there:
            return name
    raise ValueError(f"data: {what}: expected one of {', '.join(names)}; got {', '.join(there)}")
