"""The workers' half of `--augment-on device`: an image cropped, and what else is to be done to it.

The workers crop and mirror as ever. They draw the rest without doing it: timm's and torchvision's
own transforms run with functions that note themselves in place of those that change an image. The
generators are set from the sample's counters and are asked the same questions as where workers
augment. So a sample gets the same operations, magnitudes and erased box either way; the erased
pixels alone are drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from deit.data.augment import operations, three_augment, timm_transform, training_transform
from deit.data.on_device import Augmentation, Drawn, Operation
from deit.recipes import Recipe

Drawing = Callable[[Image.Image], tuple[Tensor, Drawn]]
Noted = tuple[Operation, ...]  # stands in for an image: the operations so far
Box = tuple[int, int, int, int]

SIDE = 2**0.5  # torchvision's five weights stand at -SIDE to SIDE sigmas


def split(
    recipe: Recipe,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> tuple[Drawing, Augmentation]:
    """`training_transform(recipe, size, mean, std)` in two: a worker's part and the device's.

    The worker's makes RGB images [3, size, size] uint8 and says what was drawn.

    Raises ValueError for an operation that has no kernel for a device, or for such a device.
    """
    if recipe.crop == "center":
        return _Center(recipe, size, mean, std), Augmentation(mean, std, (0, 0, 0), device)
    if recipe.policy == "3a":
        return _ThreeAugment(recipe, size, mean, std), Augmentation(mean, std, (0, 0, 0), device)
    drawing = _Timm(recipe, size, mean, std)
    return drawing, Augmentation(mean, std, drawing.fill, device)


class _Center:
    """Mirror and centre crop; nothing is left to draw."""

    def __init__(self, recipe: Recipe, size: int, mean: Any, std: Any) -> None:
        whole: Any = training_transform(recipe, size, mean, std)
        mirror, prepared = whole.transforms
        self.crop = v2.Compose([mirror, prepared.transforms[0]])

    def __call__(self, image: Image.Image) -> tuple[Tensor, Drawn]:
        return self.crop(image), Drawn()


class _Timm:
    """timm's crop, and what its policy, or colour jitter, and random erasing draw."""

    def __init__(self, recipe: Recipe, size: int, mean: Any, std: Any) -> None:
        crop, policy, rest = timm_transform(recipe, size, mean, std, separate=True)
        self.crop = v2.Compose([crop, v2.PILToTensor()])
        self.fill = (0, 0, 0)
        self.steps = [self._noting(step, recipe.policy, size) for step in policy.transforms]
        self.erasing = rest.transforms[-1] if recipe.random_erasing else None
        if self.erasing is not None:
            self.erasing.per_pixel = False  # its noise would be thrown away

    def _noting(self, step: Any, policy: str | None, size: int) -> Callable[[Noted], Noted]:
        """A step of timm's policy whose operations note themselves."""
        from timm.data.auto_augment import AutoAugment, RandAugment
        from torchvision.transforms import ColorJitter

        if isinstance(step, ColorJitter):
            return partial(_jittered, step)
        if not isinstance(step, (RandAugment, AutoAugment)):
            raise ValueError(
                f"augment_on: policy {policy!r} has {type(step).__name__}, which has no kernel for "
                "a device; expected RandAugment or AutoAugment, or augment_on 'workers'"
            )
        for operation in operations(step):
            name = operation.aug_fn.__name__
            if name not in NUMBERS:
                raise ValueError(
                    f"augment_on: policy {policy!r} has {operation.name}, which has no kernel for "
                    f"a device; expected among {', '.join(NUMBERS)}, or augment_on 'workers'"
                )
            operation.aug_fn = partial(_noted, name, size)
            self.fill = operation.kwargs["fillcolor"]
        return step

    def __call__(self, image: Image.Image) -> tuple[Tensor, Drawn]:
        crop = self.crop(image)
        noted: Noted = ()
        for step in self.steps:
            noted = step(noted)
        if self.erasing is None:
            return crop, Drawn(noted)
        note = _ErasedBox(crop.shape)
        self.erasing(note)
        noise = None if note.box is None else int(torch.randint(2**62, ()))
        return crop, Drawn(noted, note.box, noise)


class _ErasedBox:
    """Stands in for an image: keeps where timm's RandomErasing writes."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.box: Box | None = None

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: Tensor) -> None:
        _, rows, columns = where
        self.box = (rows.start, columns.start, rows.stop, columns.stop)


class _ThreeAugment:
    """The crop of 3-Augment, and what its steps draw."""

    def __init__(self, recipe: Recipe, size: int, mean: Any, std: Any) -> None:
        whole = three_augment(recipe, size, mean, std)
        crop, mirror, self.one_of, self.jitter, *_, self.erasing = whole.transforms
        self.crop = v2.Compose([crop, mirror, v2.PILToTensor()])
        _grey, solarise, blur = self.one_of.transforms
        self.one_of.transforms = [
            partial(_noted, "color", size, magnitude=0.0),
            partial(_solarised, solarise, size),
            partial(_blurred, blur),
        ]

    def __call__(self, image: Image.Image) -> tuple[Tensor, Drawn]:
        crop = self.crop(image)
        noted = _jittered(self.jitter, self.one_of(()))
        if torch.rand(1) >= self.erasing.p:
            return crop, Drawn(noted)
        box = self.erasing.make_params([crop])
        if box["v"] is None:  # no box of ten fitted
            return crop, Drawn(noted)
        top, left = box["i"], box["j"]
        return crop, Drawn(noted, (top, left, top + box["h"], left + box["w"]))


# Operations that note themselves ----------------------------------------------------------------


def _rotation(degrees: float, size: int) -> tuple[float, ...]:
    """Pillow's matrix of Image.rotate about the centre of a square image."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    half = size / 2
    return cos, -sin, half - half * cos + half * sin, sin, cos, half - half * sin - half * cos


# timm's function -> the device's kernel, and its arguments from the magnitude and the image's side.
NUMBERS: dict[str, tuple[str, Callable[[float, int], tuple[float, ...]]]] = {
    "auto_contrast": ("auto_contrast", lambda magnitude, side: ()),
    "equalize": ("equalize", lambda magnitude, side: ()),
    "invert": ("invert", lambda magnitude, side: ()),
    "rotate": ("affine", _rotation),
    "shear_x": ("affine", lambda by, side: (1, by, 0, 0, 1, 0)),
    "shear_y": ("affine", lambda by, side: (1, 0, 0, by, 1, 0)),
    "translate_x_rel": ("affine", lambda by, side: (1, 0, by * side, 0, 1, 0)),
    "translate_y_rel": ("affine", lambda by, side: (1, 0, 0, 0, 1, by * side)),
    "translate_x_abs": ("affine", lambda by, side: (1, 0, by, 0, 1, 0)),
    "translate_y_abs": ("affine", lambda by, side: (1, 0, 0, 0, 1, by)),
    "posterize": ("posterize", lambda bits, side: (256 - (1 << max(0, 8 - int(bits))),)),
    "solarize": ("solarize", lambda threshold, side: (threshold,)),
    "solarize_add": ("solarize_add", lambda add, side: (add,)),
    "color": ("color", lambda factor, side: (factor,)),
    "contrast": ("contrast", lambda factor, side: (factor,)),
    "brightness": ("brightness", lambda factor, side: (factor,)),
    "sharpness": ("sharpness", lambda factor, side: (factor,)),
}


def _noted(name: str, size: int, noted: Noted, magnitude: float = 0.0, **_: Any) -> Noted:
    """In place of timm's function `name`, which would change an image of `size` pixels."""
    kernel, arguments = NUMBERS[name]
    return (*noted, Operation(kernel, arguments(magnitude, size)))


def _jittered(jitter: Any, noted: Noted) -> Noted:
    """Brightness, contrast and saturation by the factors, and in the order, that are drawn."""
    order, *factors, _ = jitter.get_params(
        jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    )
    names = ("brightness", "contrast", "color")
    drawn = {at: Operation(names[at], (f,)) for at, f in enumerate(factors) if f is not None}
    return (*noted, *(drawn[at] for at in order.tolist() if at in drawn))


def _solarised(solarise: Any, size: int, noted: Noted) -> Noted:
    torch.rand(1)  # whether: always, but torchvision asks
    return _noted("solarize", size, noted, solarise.threshold)


def _blurred(blur: Any, noted: Noted) -> Noted:
    """The five weights of torchvision's Gaussian for the sigma that is drawn."""
    sigma, _ = blur.make_params([])["sigma"]
    at = torch.linspace(-SIDE, SIDE, 5)
    weights = torch.softmax(at.div(sigma).pow(2).neg(), dim=0)
    return (*noted, Operation("blur", tuple(weights.tolist())))
