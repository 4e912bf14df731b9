"""The device's half of `--augment-on device`: a batch of crops, augmented as its samples drew.

Samples that drew the same operation are done together: a batch of any size is some dozens of
kernels a layer of operations. torchvision's tensor kernels take one magnitude a call, and a
recipe's magnitudes are continuous. So operations with a magnitude are written here, in Pillow's
arithmetic, as timm's are; the others are torchvision's. Images are uint8 between operations, as
Pillow's are.

A sample's bits do not depend on the others of its batch, so not on the number of processes:
sums are of integers, and every other step is elementwise, its products and sums rounded one by one
(in a fused multiply-add the last bit would depend on the place in memory).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from deit.data.images import normalise


class Operation(NamedTuple):
    """One step of a sample's augmentation."""

    name: str  # of KERNELS
    arguments: tuple[float, ...] = ()


class Drawn(NamedTuple):
    """What is to be done to one sample on the device."""

    operations: tuple[Operation, ...] = ()
    erased: tuple[int, int, int, int] | None = None  # top, left, bottom, right
    noise: int | None = None  # seed of the normal pixels in there; None: zeros


class Augmentation:
    """Does what was drawn, and normalises; `images` may be overwritten.

    Raises ValueError for a device on which it was never run.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        fill: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """`fill`: the colour, 0 to 255, of what an affine operation moves into the image."""
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"augment_on: expected a CPU or a CUDA device; got {device}")
        self.mean, self.std, self.device = mean, std, device
        self.fill = torch.tensor(fill, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.generator = torch.Generator(device)

    def __call__(self, images: Tensor, drawn: list[Drawn]) -> Tensor:
        """[B, 3, H, W] uint8 on the device, and what each sample drew -> the same in fp32."""
        groups = grouped(drawn)
        # One copy to the device each: a group has some samples, and an update dozens of groups.
        rows = self._there([row for group in groups for row in group.rows], torch.int64)
        numbers = self._there([x for group in groups for x in group.arguments], torch.float32)
        each_rows = rows.split([len(group.rows) for group in groups])
        each_numbers = numbers.split([len(group.arguments) for group in groups])
        for group, index, flat in zip(groups, each_rows, each_numbers, strict=True):
            arguments = flat.view(len(index), len(flat) // len(index))
            images[index] = KERNELS[group.name](images[index], arguments, self.fill)
        return self._erase(normalise(images, mean=self.mean, std=self.std), drawn)

    def _there(self, values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        here = torch.tensor(values, dtype=dtype)
        if self.device.type == "cuda":
            here = here.pin_memory()  # or the copy would wait for what runs there
        return here.to(self.device, non_blocking=True)

    def _erase(self, images: Tensor, drawn: list[Drawn]) -> Tensor:
        """Random erasing (arXiv 1708.04896), in place: a box of normal pixels, or of zeros."""
        for image, (_, erased, noise) in zip(images, drawn, strict=True):
            if erased is None:
                continue
            top, left, bottom, right = erased
            box = image[:, top:bottom, left:right]
            if noise is None:
                box.zero_()
            else:
                self.generator.manual_seed(noise)
                box.copy_(torch.randn(box.shape, generator=self.generator, device=self.device))
        return images


class Group(NamedTuple):
    """The samples that one kernel does together."""

    name: str
    rows: list[int]
    arguments: list[float]  # of each in turn


def grouped(drawn: list[Drawn]) -> list[Group]:
    """The kernels of a batch: of all samples' first operations, then of their second ones, ..."""
    groups: list[Group] = []
    for layer in zip_longest(*(each.operations for each in drawn)):
        found: dict[str, Group] = {}
        for row, operation in enumerate(layer):
            if operation is not None:
                group = found.setdefault(operation.name, Group(operation.name, [], []))
                group.rows.append(row)
                group.arguments.extend(operation.arguments)
        groups += found.values()
    return groups


# Kernels ----------------------------------------------------------------------------------------
# images [n, 3, H, W] uint8, arguments [n, k] fp32, fill [1, 3, 1, 1] -> images as they came.


def _affine(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    """Pillow's Image.transform: output pixel (x, y) is from (a x + b y + c, d x + e y + f).

    Bicubic by PyTorch's kernel, whose weights are Keys' with a = -0.75, where Pillow's have -1;
    pixels beyond an edge are the edge's, and an image's whose place is outside are `fill`.
    """
    height, width = images.shape[-2:]
    a, b, c, d, e, f = arguments.view(-1, 6, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device) + 0.5
    y = (torch.arange(height, device=images.device) + 0.5).view(-1, 1)
    across, down = a * x + b * y + c, d * x + e * y + f
    grid = torch.stack((across * (2 / width) - 1, down * (2 / height) - 1), -1)
    found = torch.nn.functional.grid_sample(
        images.float(), grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    return torch.where(inside.unsqueeze(1), found.clamp_(0, 255), fill).to(torch.uint8)


def _blend(images: Tensor, other: Tensor, arguments: Tensor) -> Tensor:
    """Pillow's Image.blend: other + factor (images - other), clipped and cut to integers."""
    other = other.float()
    between = images.float().sub_(other).mul_(arguments.view(-1, 1, 1, 1))
    return between.add_(other).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """[n, 1, H, W] int32: Pillow's "L", by its integers."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _color(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    return _blend(images, _grey(images), arguments)


def _contrast(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    grey = _grey(images)
    pixels = grey[0].numel()
    # The mean, rounded, of integers: exact in any order.
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    return _blend(images, mean, arguments)


def _brightness(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), arguments)


def _sharpness(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    # Rounded thirteenths: no order of their sum comes near a half.
    return _blend(images, functional.adjust_sharpness(images, 0.0), arguments)


def _posterize(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    return images & arguments.to(torch.uint8).view(-1, 1, 1, 1)


def _solarize(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    return torch.where(images < arguments.view(-1, 1, 1, 1), images, ~images)


def _solarize_add(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    added = images + arguments.to(torch.uint8).view(-1, 1, 1, 1)  # at most 127 + 128
    return torch.where(images < 128, added, images)


def _blur(images: Tensor, arguments: Tensor, fill: Tensor) -> Tensor:
    """5 x 5, by each sample's own five weights; rounded as torchvision's is."""
    out = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    weights = arguments.view(-1, 5, 1, 1, 1).unbind(1)
    for dim in (3, 2):
        size = images.shape[dim]
        parts = [w * out.narrow(dim, at, size) for at, w in enumerate(weights)]
        out = functools.reduce(torch.add, parts)
    return out.round_().to(torch.uint8)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "affine": _affine,
    "auto_contrast": lambda images, arguments, fill: functional.autocontrast(images),
    "equalize": lambda images, arguments, fill: functional.equalize(images),
    "invert": lambda images, arguments, fill: functional.invert(images),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "blur": _blur,
}
