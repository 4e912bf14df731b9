"""The likeliest classes of photographs, and the names of classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deit.data.images import PhotoLoader
from deit.data.limits import not_regular
from deit.model import DeiT

CLASSES_BYTES = 64 << 20  # of a file of class names


@dataclass(frozen=True)
class Guess:
    """One class: its index, its name (the index again where names are unknown), probability."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one photograph, the likeliest first."""

    path: Path
    top: list[Guess]


def class_names(num_classes: int, file: Path | None = None) -> list[str]:
    """A name for every class: from `file`, ImageNet's (as timm has them) for 1000, else indices.

    Raises ValueError if the file is not text, or has not one name for every class.
    """
    if file is not None:
        names = _lines(file)
        if len(names) != num_classes:
            raise ValueError(
                f"classes: expected {num_classes} lines, one for each class of the network; "
                f"{file} has {len(names)}"
            )
        return names
    if num_classes != 1000:
        return [f"class {index}" for index in range(num_classes)]
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_descriptions()


def _lines(file: Path) -> list[str]:
    """Lines of UTF-8 text, with a byte order mark or without; they end in LF, CR LF or CR alone.

    str.splitlines would end them at form feeds and U+2028 as well, which names may hold.
    """
    what = not_regular(file)
    if what is not None:
        raise ValueError(f"classes: expected a regular file; got {what}, {file}")
    if (size := file.stat().st_size) > CLASSES_BYTES:
        raise ValueError(f"classes: expected at most {CLASSES_BYTES} bytes; {file} has {size}")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"classes: {file} is not UTF-8 text ({error.reason})") from None
    return lines[:-1] if lines[-1] == "" else lines


def predict(
    model: DeiT, loader: PhotoLoader, names: Sequence[str], topk: int = 5
) -> Iterator[list[Prediction]]:
    """A list of predictions for each batch of `loader`, on the model's device and dtype.

    Probabilities are the softmax, in fp32, of what the model returns in evaluation mode; see
    `DeiT` for its `test_head`. Images that cannot be read are left to `loader.unreadable`.
    Raises ValueError if `topk` is not in 1..classes, or an output is not finite.
    """
    if not 1 <= topk <= model.config.num_classes:
        raise ValueError(
            f"topk: expected 1 to {model.config.num_classes}, the network's classes; got {topk}"
        )
    model.eval()
    for images, paths in loader:
        with torch.inference_mode():
            probabilities = model(images).float().softmax(dim=-1)
            values, indices = (t.tolist() for t in probabilities.topk(topk))
        found = []
        for path, row, places in zip(paths, values, indices, strict=True):
            if row[0] != row[0]:
                raise ValueError(
                    f"{path}: the network's output is not finite in {images.dtype} "
                    "(fp16 overflows where fp32 and bf16 do not)"
                )
            guesses = zip(places, row, strict=True)
            found.append(Prediction(path, [Guess(i, names[i], p) for i, p in guesses]))
        yield found
