"""Augmentation of one image in a worker process, and mixing of a batch.

The operations are timm's and torchvision's. They draw from the generators of Python, NumPy and
torch, which `seeded` sets from a sample's own counters before each image.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from deit.data.images import Prepare
from deit.data.sampling import Draw, stream
from deit.recipes import Recipe

Transform = Callable[[Image.Image], Tensor]


@contextmanager
def seeded(*counters: int) -> Iterator[None]:
    """Set Python's, NumPy's and torch's CPU generators from the counters; restore them after."""
    numpy_state = np.random.get_state()  # noqa: NPY002 (timm draws from the global generator)
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    seeds = stream(*counters).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))  # noqa: NPY002
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.default_generator.set_state(torch_state)


def training_transform(
    recipe: Recipe, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Transform:
    """RGB image -> [3, size, size] fp32, augmented by the recipe and normalised."""
    if recipe.crop == "center":
        plain = evaluation_transform(size, recipe.eval_crop, mean, std)
        return v2.Compose([v2.RandomHorizontalFlip(recipe.hflip), plain])
    if recipe.policy == "3a":
        return three_augment(recipe, size, mean, std)
    return timm_transform(recipe, size, mean, std)


def timm_transform(
    recipe: Recipe,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    separate: bool = False,
) -> Any:
    """timm's transform of a recipe; `separate`: in three, crop and mirror, policy, the rest."""
    from timm.data import create_transform

    made = create_transform(
        size,
        is_training=True,
        scale=recipe.crop_scale,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,  # timm leaves it out beside a policy, as DeiT does
        auto_augment=recipe.policy,
        interpolation="bicubic",
        mean=mean,
        std=std,
        re_prob=recipe.random_erasing,
        re_mode="pixel",
        separate=separate,
    )
    for part in made if separate else (made,):
        for step in part.transforms:
            for operation in operations(step):
                if operation.aug_fn.__name__ == "posterize":
                    operation.aug_fn = posterize
    return made


def operations(step: Any) -> list[Any]:
    """timm's operations in one of its policies; none in another transform."""
    of_pairs = (operation for some in getattr(step, "policy", ()) for operation in some)
    return [*getattr(step, "ops", ()), *of_pairs]


def posterize(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """timm's posterize, which also takes 0 bits: black. DeiT's policy draws that now and then.

    Pillow 13 refuses them, which ended a run at one image in 660.
    """
    from timm.data import auto_augment

    if bits < 1:
        return image.point([0] * (256 * len(image.getbands())))
    return auto_augment.posterize(image, bits, **settings)


def three_augment(
    recipe: Recipe, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> v2.Compose:
    """3-Augment (arXiv 2204.07118, section 3.2): one of grey, solarise and blur; then jitter."""
    one_of = v2.RandomChoice(
        [v2.Grayscale(3), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(5, (0.1, 2.0))]
    )
    strength = recipe.color_jitter
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size, scale=recipe.crop_scale, interpolation=InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(recipe.hflip),
            one_of,
            v2.ColorJitter(strength, strength, strength),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
            v2.RandomErasing(recipe.random_erasing),
        ]
    )


def evaluation_transform(
    size: int, ratio: float | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> Transform:
    """RGB image -> [3, size, size] fp32: bicubic resize, centre crop, normalised."""
    steps = [Prepare(size, ratio), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose(steps)


def mix(
    images: Tensor, labels: Tensor, draws: list[Draw], classes: int, recipe: Recipe, seed: int
) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of neighbours in the update's batch.

    One share lambda for the whole update, drawn from (seed, update) in every process alike, as
    the official code's batch mode does; sample 2k mixes with 2k + 1, and one whose neighbour was
    unreadable stays as it is.

    Args:
        images: [B, 3, H, W]. labels: [B], int64. draws: of each sample.

    Returns:
        images, and targets: [B, classes] probabilities where a recipe mixes, else the labels.
    """
    if recipe.mixup == 0.0 and recipe.cutmix == 0.0:
        return images, labels
    target = torch.nn.functional.one_hot(labels, classes).to(images.dtype)
    rng = np.random.default_rng(stream(seed, draws[0].update, 1))
    kind, share, box = _draw_mix(rng, recipe, images.shape[-2:])
    if kind == "none":
        return images, target
    places = {draw.position: row for row, draw in enumerate(draws)}
    partner = [places.get(draw.position ^ 1, row) for row, draw in enumerate(draws)]
    other = torch.tensor(partner, device=images.device)
    if kind == "mixup":
        images = torch.lerp(images[other], images, share)
    else:
        top, bottom, left, right = box
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[other][..., top:bottom, left:right]
        images = mixed
    return images, torch.lerp(target[other], target, share)


def _draw_mix(
    rng: np.random.Generator, recipe: Recipe, shape: torch.Size
) -> tuple[str, float, tuple[int, int, int, int]]:
    """What to do, the share of the image itself, and the box that CutMix replaces."""
    nothing = (0, 0, 0, 0)
    if rng.random() >= recipe.mix_probability:
        return "none", 1.0, nothing
    cut = rng.random() < recipe.mix_switch if recipe.mixup and recipe.cutmix else recipe.cutmix > 0
    alpha = recipe.cutmix if cut else recipe.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return "mixup", share, nothing
    height, width = shape
    side = (1.0 - share) ** 0.5
    centre = rng.integers(height), rng.integers(width)
    half = int(height * side) // 2, int(width * side) // 2
    top, left = (max(0, int(c) - h) for c, h in zip(centre, half, strict=True))
    bottom = min(height, int(centre[0]) + half[0])
    right = min(width, int(centre[1]) + half[1])
    # The box was cut at the edges: the share is what remains of the image.
    return "cutmix", 1.0 - (bottom - top) * (right - left) / (height * width), (
        top, bottom, left, right,
    )  # fmt: skip
