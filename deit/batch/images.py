"""One image of whatever kind a caller has, as the network's uint8 pixels."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from deit.data.decoding import UnreadableImage, check_size, load_image, of_pillow
from deit.data.images import Prepare
from deit.data.limits import limit, not_regular

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# "exact": as in evaluation, by Pillow. "fast": resized by PyTorch's vector instructions, and plain
# JPEGs decoded by simplejpeg where it is installed, to the same pixels as by Pillow but straight
# into memory that PyTorch reads: of 12 megapixels the way from Pillow's took as long as decoding.
# "scaled": that, and a JPEG of more than twice the size needed is decoded at a half, a quarter or
# an eighth.
Decode = Literal["exact", "fast", "scaled"]
DECODES = ("exact", "fast", "scaled")


class Reader:
    """Encoded bytes, a path, an array or a Pillow image -> [3, size, size] uint8.

    Picklable: the workers that decode are given one. See `Prepare` and `load_image` for how far
    the pixels of "fast" and "scaled" are from those of "exact".
    """

    def __init__(self, size: int, ratio: float | None, decode: str = "exact") -> None:
        """Raises ValueError for an unknown `decode`, a DEIT_MAX_IMAGE_BYTES that is no number, and
        as `Prepare` does."""
        if decode not in DECODES:
            raise ValueError(f"decode: expected one of {', '.join(DECODES)}; got {decode!r}")
        limit("DEIT_MAX_IMAGE_BYTES")  # one that is no number would make every image unreadable
        self.prepare = Prepare(size, ratio, fast=decode != "exact")
        # Twice the size, so that the resize still filters: the mean difference from the whole
        # image is then 0.2 of 255 on photographs of 12 megapixels; at once the size, 0.6.
        self.at_least = 2 * self.prepare.short_side if decode == "scaled" else None

    def __call__(self, image: Any, name: str = "image") -> Tensor:
        """Raises UnreadableImage for an image that cannot be read, TypeError for no image."""
        if isinstance(image, (str, Path)):
            return self._encoded(image, str(image))
        if isinstance(image, (bytes, bytearray, memoryview)):
            return self._encoded(bytes(image), name)
        if isinstance(image, Image.Image):
            return self.prepare(of_pillow(image, name))
        if isinstance(image, np.ndarray):
            return self.prepare(_of_array(image, name))
        raise TypeError(
            f"{name}: expected bytes of an image file, a path, a uint8 array or a Pillow "
            f"image; got {type(image).__name__}"
        )

    def _encoded(self, source: str | Path | bytes, name: str) -> Tensor:
        if self.prepare.fast:
            pixels = _plain_jpeg(source, self.at_least)
            if pixels is not None:
                return self.prepare(pixels)
        return self.prepare(load_image(source, name, at_least=self.at_least))


def _plain_jpeg(source: str | Path | bytes, at_least: int | None) -> Tensor | None:
    """[3, H, W] of a JPEG in RGB that stands upright; None for whatever `load_image` has to see.

    Of that: other formats and modes, limits, damage (simplejpeg refuses what libjpeg warns of), and
    a size at which its scaled decoding begins.
    """
    if simplejpeg is None:
        return None
    try:
        if not isinstance(source, bytes):
            if not_regular(Path(source)) is not None:
                return None
            check_size(os.path.getsize(source), source)
            source = Path(source).read_bytes()
        check_size(len(source), "image")
        with Image.open(io.BytesIO(source), formats=("JPEG",)) as image:
            scaled = at_least is not None and min(image.size) >= 2 * at_least
            most = Image.MAX_IMAGE_PIXELS
            if image.mode != "RGB" or scaled or (most and image.width * image.height > most):
                return None
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return None
        pixels = simplejpeg.decode_jpeg(source, "RGB", fastdct=False, fastupsample=False)
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except Exception:  # whatever it is, Pillow meets it again, and gives the reason
        return None


def _of_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise TypeError(f"{name}: expected an array of uint8; got {array.dtype}")
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{name}: expected an array [height, width, 3]; got {list(array.shape)}")
    if not array.size:
        raise UnreadableImage(name, f"{array.shape[1]} x {array.shape[0]} pixels are no image")
    return Image.fromarray(array)
