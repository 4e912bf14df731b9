"""`deit explain-image`: where a network's prefix tokens look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deit.commands import flags


@dataclass(frozen=True)
class ExplainImage:
    """Draw where a network's class and distillation tokens look in a photograph."""

    image: flags.Positional[Path]
    """The photograph."""
    weights: Path
    """A run's folder, or a DeiT's weights."""
    out: Path = Path("attention.png")
    """The picture."""
    layer: int = -1
    """Which block's attention, negative from the end."""
    heads: bool = False
    """Each head beside their mean."""

    def run(self) -> int:
        """Write the picture; returns 0."""
        import torch
        from PIL import Image

        from deit.attention_maps import attention_maps, picture
        from deit.data.images import IMAGENET_MEAN, IMAGENET_STD, Prepare, load_image
        from deit.weights import networks

        model, about = networks.opened_deit(self.weights)
        prepare = Prepare(model.config.img_size, networks.crop_of(about))
        pixels = prepare(load_image(self.image))
        mean = torch.tensor(about.get("mean", IMAGENET_MEAN)).view(3, 1, 1)
        std = torch.tensor(about.get("std", IMAGENET_STD)).view(3, 1, 1)
        images = (pixels / 255 - mean) / std
        maps = attention_maps(model, images[None], self.layer)[0]
        shown = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        factor = max(1, -(-224 // model.config.img_size))  # small images are shown larger
        size = shown.width * factor, shown.height * factor
        shown = shown.resize(size, Image.Resampling.NEAREST)
        picture(shown, maps, self.heads).save(self.out)
        tokens = "the class token" + (" and the distillation token" if maps.shape[1] == 2 else "")
        print(f"attention of {tokens} in block {self.layer} is in {self.out}")
        return 0
