"""Fashion-MNIST and a small DeiT trained on it: a really trained network for accuracy checks.

The data (arXiv 1708.07747) are the four `*-ubyte.gz` files of Debian's package
dataset-fashion-mnist, or the same files from anywhere.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import deit
from deit.model import DeiT

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CONFIG = deit.Config(
    "fashion", embed_dim=64, num_heads=1, depth=4, img_size=28, patch_size=4, in_chans=1,
    num_classes=10,
)  # fmt: skip
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels in [0, 1]


def load(split: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 28, 28], normalised fp32, and labels [n] of "train" or "t10k".

    Raises FileNotFoundError, with what to install, where a file is absent.
    """
    path = folder / f"{split}-images-idx3-ubyte.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: apt-get install dataset-fashion-mnist, or name the folder"
        )
    pixels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16)
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    images = torch.from_numpy(pixels.copy()).view(-1, 1, 28, 28).float().div_(255)
    return images.sub_(MEAN).div_(DEVIATION), torch.tensor(list(labels[8:]))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored half of the time, and shifted by up to two pixels, a batch at a time."""
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(-1)
    up, left = torch.randint(0, 5, (2,), generator=generator).tolist()
    blank = -MEAN / DEVIATION
    return F.pad(images, (2, 2, 2, 2), value=blank)[..., up : up + 28, left : left + 28]


def train(
    epochs: int, folder: Path = FOLDER, *, batch: int = 128, seed: int = 0,
    tell: Callable[[str], None] = print,
) -> DeiT:  # fmt: skip
    """A DeiT of CONFIG trained from scratch in fp32, AdamW under a cosine; in eval mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load("train", folder)
    model = DeiT(CONFIG, drop_path=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    steps = epochs * (len(images) // batch)
    warmup = min(200, steps // 10)
    shape = lambda s: min((s + 1) / max(warmup, 1), 0.5 * (1 + np.cos(np.pi * s / steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    started = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for chosen in order.split(batch)[: len(images) // batch]:
            loss = F.cross_entropy(
                model(augment(images[chosen], generator)), labels[chosen], label_smoothing=0.1
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        mean = total / (len(images) // batch)
        tell(f"epoch {epoch + 1}: loss {mean:.4f}, {time.perf_counter() - started:.0f} s")
    return model.eval()
