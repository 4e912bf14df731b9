"""Real photographs to normalised batches: find them, decode them, prepare them as in evaluation.

    loader = PhotoLoader(find_images("photos/"), size=224, batch_size=64, workers=2)
    for images, paths in loader:        # images: [B, 3, 224, 224], fp32, normalised
        ...
    print(loader.summary())             # "118 of 120 images read; 2 unreadable: ..."

A file that cannot be read is left out of the batches, counted and named in `loader.unreadable`;
nothing takes its place. The next good images move up, so that every batch but the last is full.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from deit.data.decoding import UnreadableImage, find_images, load_image

# Channel statistics of ImageNet, which every published DeiT was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NothingReadable",
    "PhotoLoader",
    "Prepare",
    "Unreadable",
    "UnreadableImage",
    "crop_ratio",
    "find_images",
    "load_image",
    "normalise",
]


class NothingReadable(ValueError):
    """Not one of a loader's images could be read."""


def crop_ratio(size: int) -> float:
    """How much of the resized image's short side the crop keeps: 1.0 from 384 pixels, else 0.875.

    The evaluation of arXiv 2012.12877: 256 -> 224, and the whole short side at 384.
    """
    return 1.0 if size >= 384 else 0.875


class Prepare:
    """RGB image -> [3, size, size] uint8: bicubic resize of the short side, centre crop.

    `ratio` None takes `crop_ratio(size)`. `fast` resizes by PyTorch's vector instructions, not by
    Pillow's loops. Both are bicubic with the same support, but PyTorch's weights have 16 bits: on
    photographs 0.3 % of the values differ, by 1 of 255.

    Raises ValueError for a size below 1 or a ratio outside (0, 1]; UnreadableImage for an image so
    elongated that its resized self would pass Pillow's pixel limit.
    """

    def __init__(self, size: int, ratio: float | None = None, *, fast: bool = False) -> None:
        ratio = crop_ratio(size) if ratio is None else ratio
        if size < 1:
            raise ValueError(f"size: expected at least 1 pixel; got {size}")
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio: expected in (0, 1]; got {ratio}")
        self.short_side = math.floor(size / ratio)
        self.fast = fast
        resize = v2.Resize(self.short_side, interpolation=InterpolationMode.BICUBIC)
        steps = [resize, v2.CenterCrop(size)]
        tensor = v2.PILToTensor()  # of a tensor: itself
        self.steps = v2.Compose([tensor, *steps] if fast else [*steps, tensor])

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """`image`: Pillow's; or, where `fast`, its pixels [3, height, width] too."""
        height, width = image.shape[1:] if isinstance(image, Tensor) else image.size[::-1]
        long_side = self.short_side * max(height, width) / min(height, width)
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and long_side * self.short_side > most:
            raise UnreadableImage(
                "image",
                f"{width} x {height} is too elongated: resized to a short side "
                f"of {self.short_side} it exceeds Pillow's limit of {most} pixels",
            )
        return self.steps(image)


def normalise(
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """[..., 3, H, W] uint8 -> the same shape in `dtype`: (x / 255 - mean) / std by channel.

    Computed in fp32 on the images' own device. Raises TypeError for another dtype than uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected torch.uint8; got {images.dtype}")
    scaled = v2.functional.to_dtype(images, torch.float32, scale=True)
    return v2.functional.normalize(scaled, list(mean), list(std), inplace=True).to(dtype)


@dataclass(frozen=True)
class Unreadable:
    """One file that is in no batch, and why."""

    path: Path
    reason: str


class _Decoded(Dataset):
    """path -> (path, prepared uint8 tensor) or (path, reason); runs in the worker processes."""

    def __init__(self, paths: list[Path], prepare: Prepare) -> None:
        self.paths = paths
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, Tensor | str]:
        path = self.paths[index]
        try:
            return path, self.prepare(load_image(path))
        except UnreadableImage as error:
            return path, error.reason


_Batch = tuple[Tensor, list[Path], list[Unreadable]]


def _collate(items: list[tuple[Path, Tensor | str]]) -> _Batch:
    good = [(path, image) for path, image in items if isinstance(image, Tensor)]
    bad = [Unreadable(path, why) for path, why in items if isinstance(why, str)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return images, [path for path, _ in good], bad


class PhotoLoader:
    """Iterates over (images, paths): [B, 3, size, size] normalised on `device`, and their files.

    Files are decoded, resized and cropped in `workers` processes that work ahead; batches travel
    as uint8, a quarter of the bytes, and are normalised in the process (and on the device) that
    uses them. Iterating again starts afresh, and `unreadable` is of the last pass.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        size: int = 224,
        batch_size: int = 64,
        *,
        workers: int | None = None,
        ratio: float | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare to read `paths` (see `find_images`) in their order.

        Args:
            size: pixels along one side of the images given out.
            batch_size: images in every batch but the last.
            workers: decoding processes; 0 decodes in this one. None: one a usable core, at most
                8 and no more than there are batches.
            ratio: crop ratio; None for the paper's (see `crop_ratio`).
            mean, std: of the channels, in [0, 1].
            device, dtype: of the images given out.

        Raises ValueError for no paths, a batch_size below 1 or negative workers.
        """
        self.paths = [Path(path) for path in paths]
        if not self.paths:
            raise ValueError("paths: expected at least one image; got none")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1; got {batch_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: expected at least 0; got {workers}")
        self.size = size
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.dtype = dtype
        self.prepare = Prepare(size, ratio)
        self.mean, self.std = mean, std
        self.workers = self._default_workers() if workers is None else workers
        self.unreadable: list[Unreadable] = []
        self.read = 0

    def _default_workers(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # A worker takes about 0.1 s to start and decodes a photograph in about 0.01 s.
        return min(cores or 1, 8, len(self)) if len(self.paths) > 32 else 0

    def __len__(self) -> int:
        """Batches in a pass if every image can be read."""
        return math.ceil(len(self.paths) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Path]]]:
        """One pass. Raises NothingReadable, a ValueError, at its end if no image was readable."""
        self.unreadable, self.read = [], 0
        pending, names = None, []
        for images, paths, bad in self._decoded():
            self.unreadable += bad
            if not paths:
                continue
            self.read += len(paths)
            names += paths
            pending = images if pending is None else torch.cat([pending, images])
            if len(names) >= self.batch_size:
                yield self._finish(pending[: self.batch_size]), names[: self.batch_size]
                pending, names = pending[self.batch_size :], names[self.batch_size :]
                pending = pending if names else None
        if pending is not None:
            yield self._finish(pending), names
        if not self.read:
            raise NothingReadable(f"images: {self.summary()}")

    def _decoded(self) -> Iterable[_Batch]:
        return DataLoader(
            _Decoded(self.paths, self.prepare),
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
        )

    def _finish(self, images: Tensor) -> Tensor:
        there = images.to(self.device, non_blocking=True)
        return normalise(there, self.dtype, self.mean, self.std)

    def summary(self, limit: int = 10) -> str:
        """How many of the last pass's files were read, and the first `limit` that were not."""
        text = f"{self.read} of {self.read + len(self.unreadable)} images read"
        if not self.unreadable:
            return text
        named = [f"{bad.path} ({bad.reason})" for bad in self.unreadable[:limit]]
        if len(self.unreadable) > limit:
            named.append(f"and {len(self.unreadable) - limit} more")
        return f"{text}; {len(self.unreadable)} unreadable: " + "; ".join(named)
