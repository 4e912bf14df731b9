"""Photographs for int8 calibration: crops of those that scikit-image and scikit-learn ship.

Ranges of activations taken from noise would flatter nobody: noise has no flat sky, no edges.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deit.data.images import normalise


def shipped() -> list[np.ndarray]:
    """The whole photographs, [H, W, 3] uint8."""
    import skimage.data
    import sklearn.datasets

    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
    arrays = [getattr(skimage.data, name)() for name in names]
    arrays += sklearn.datasets.load_sample_images().images
    return [array[..., :3] for array in arrays]


def photographs(size: int, count: int, seed: int = 0) -> tuple[Tensor, str]:
    """`count` square crops, [count, 3, size, size] fp32 normalised, and a word on their source.

    Crops of 30 to 100 % of the short side, half of them mirrored; the same for a seed.
    """
    sources = [torch.tensor(array).permute(2, 0, 1) for array in shipped()]
    generator = torch.Generator().manual_seed(seed)
    crops = [_crop(sources[i % len(sources)], size, generator) for i in range(count)]
    what = f"{count} crops of {len(sources)} photographs (scikit-image, scikit-learn)"
    return normalise(torch.stack(crops)), what


def _crop(photo: Tensor, size: int, generator: torch.Generator) -> Tensor:
    draw = torch.rand(4, generator=generator).tolist()
    height, width = photo.shape[1:]
    side = round(min(height, width) * (0.3 + 0.7 * draw[0]))
    top, left = round((height - side) * draw[1]), round((width - side) * draw[2])
    crop = photo[None, :, top : top + side, left : left + side].float()
    crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    crop = crop.round().clamp(0, 255).to(torch.uint8)
    return crop.flip(-1) if draw[3] < 0.5 else crop
