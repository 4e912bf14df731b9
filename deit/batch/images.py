"""One image of whatever kind a caller has, as the network's uint8 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from deit.data.decoding import UnreadableImage, load_image, to_rgb
from deit.data.images import Prepare

# "exact": as in evaluation, by Pillow. "fast": resized by PyTorch's vector instructions. "scaled":
# that, and a JPEG of more than twice the size is decoded at a half, a quarter or an eighth.
Decode = Literal["exact", "fast", "scaled"]
DECODES = ("exact", "fast", "scaled")


class Reader:
    """Encoded bytes, a path, an array or a Pillow image -> [3, size, size] uint8.

    Picklable: the workers that decode are given one. See `Prepare` and `load_image` for how far
    the pixels of "fast" and "scaled" are from those of "exact".
    """

    def __init__(self, size: int, ratio: float | None, decode: str = "exact") -> None:
        """Raises ValueError for an unknown `decode`, and as `Prepare` does."""
        if decode not in DECODES:
            raise ValueError(f"decode: expected one of {', '.join(DECODES)}; got {decode!r}")
        self.prepare = Prepare(size, ratio, fast=decode != "exact")
        # Twice the size, so that the resize still filters: the mean difference from the whole
        # image is then 0.2 of 255 on photographs of 12 megapixels; at once the size, 0.6.
        self.at_least = 2 * self.prepare.short_side if decode == "scaled" else None

    def __call__(self, image: Any, name: str = "image") -> Tensor:
        """Raises UnreadableImage for an image that cannot be read, TypeError for no image."""
        if isinstance(image, (str, Path)):
            picture = load_image(image, at_least=self.at_least)
        elif isinstance(image, (bytes, bytearray, memoryview)):
            picture = load_image(bytes(image), name, at_least=self.at_least)
        elif isinstance(image, Image.Image):
            picture = to_rgb(image, name)
        elif isinstance(image, np.ndarray):
            picture = _of_array(image, name)
        else:
            raise TypeError(
                f"{name}: expected bytes of an image file, a path, a uint8 array or a Pillow "
                f"image; got {type(image).__name__}"
            )
        return self.prepare(picture)


def _of_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise TypeError(f"{name}: expected an array of uint8; got {array.dtype}")
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{name}: expected an array [height, width, 3]; got {list(array.shape)}")
    if not array.size:
        raise UnreadableImage(name, f"{array.shape[1]} x {array.shape[0]} pixels are no image")
    return Image.fromarray(array)
