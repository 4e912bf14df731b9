"""Training recipes as frozen dataclasses, one line a setting, with the paper's values as defaults.

Sources: DeiT, arXiv 2012.12877, Table 9 (the DeiT-B column) and section 5; DeiT III, arXiv
2204.07118, Table 1. This file imports no torch: the command line reads its fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from deit.settings import refused, said


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: schedule, optimiser, regularisation and augmentation.

    The defaults are DeiT's recipe for ImageNet. Raises ValueError for a value out of its range.
    """

    # Schedule.
    epochs: int = said(  # given again, not below what was made
        300, "passes over the data; with repeated augmentation of as many views as it has images"
    )
    # Given again with another, a run goes on at the same share of its epoch.
    batch_size: int = said(1024, "images an update, over all processes and accumulated parts")
    lr: float = said(5e-4, "learning rate at `lr_batch` images an update, scaled linearly")
    lr_batch: int = said(512, "the batch that `lr` is for; 0: any batch, not scaled")
    min_lr: float = said(1e-5, "where the cosine ends; not scaled")
    warmup_epochs: float = said(5.0, "linear warm-up")
    warmup_lr: float = said(1e-6, "where the warm-up starts; not scaled")
    # Optimiser.
    optimizer: Literal["adamw", "lamb"] = refused("adamw", "update rule")
    betas: tuple[float, float] = said((0.9, 0.999), "decay of the moments")
    eps: float = said(1e-8, "of the update rule")
    weight_decay: float = said(0.05, "not on biases, norms, tokens and positions")
    clip_grad: float | None = said(None, "largest norm of the gradient; None: not clipped")
    # Given again, a run neither begins an average nor gives it up.
    ema: float | None = said(0.99996, "decay of the averaged weights; None: not averaged")
    ema_warmup: bool = said(False, "let the decay grow from 0, for runs of few updates")
    # Regularisation.
    loss: Literal["ce", "bce"] = said("ce", "of the true labels")
    label_smoothing: float = said(0.1, "of the true labels, never of the teacher's")
    drop_path: float = said(0.1, "stochastic depth of the last block, linear over depth")
    layer_scale: float | None = refused(
        None, "what LayerScale starts from in a fresh network; None: without it"
    )
    # Augmentation.
    crop: Literal["random", "center"] = said(
        "random", "random: a random resized crop; center: the evaluation's"
    )
    repeats: int = said(3, "views of an image in a pass (repeated augmentation)")
    policy: str | None = said(
        "rand-m9-mstd0.5-inc1", "timm's name of the augmentation policy, 3a, or None"
    )
    color_jitter: float = said(0.3, "strength; used where the policy has no colour operations")
    crop_scale: tuple[float, float] = said((0.08, 1.0), "share of the area a random crop keeps")
    hflip: float = said(0.5, "probability of a mirror image")
    random_erasing: float = said(0.25, "probability of a rectangle of noise")
    mixup: float = said(0.8, "alpha of the beta distribution; 0: off")
    cutmix: float = said(1.0, "alpha of the beta distribution; 0: off")
    mix_probability: float = said(1.0, "of mixing a batch at all")
    mix_switch: float = said(0.5, "probability of cutmix where both are on")
    # Evaluation.
    eval_crop: float | None = said(
        None, "crop ratio; None: the paper's, 0.875 below 384 pixels and 1.0 from there"
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        for name in ("lr", "min_lr", "warmup_epochs", "warmup_lr", "weight_decay", "lr_batch"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0; got {getattr(self, name)}")
        for name in ("hflip", "random_erasing", "mix_probability", "mix_switch"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected in [0, 1]; got {getattr(self, name)}")
        for name in ("mixup", "cutmix", "color_jitter"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}: expected at least 0; got {getattr(self, name)}")
        for name in ("label_smoothing", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected in [0, 1); got {getattr(self, name)}")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"ema: expected in (0, 1) or none; got {self.ema}")
        if self.clip_grad is not None and not self.clip_grad > 0.0:
            raise ValueError(f"clip_grad: expected above 0 or none; got {self.clip_grad}")
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_scale: expected 0 < low <= high <= 1; got {self.crop_scale}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up: `lr` scaled to `batch_size`."""
        return self.lr * self.batch_size / self.lr_batch if self.lr_batch else self.lr


DEIT = Recipe()

# Fine-tuning at a higher resolution (section 5.1; the official command line of DeiT-B at 384).
FINETUNE = replace(
    DEIT,
    epochs=30,
    batch_size=512,
    lr=5e-6,
    min_lr=5e-6,
    warmup_epochs=0.0,
    weight_decay=1e-8,
    ema=None,
)

# DeiT III, arXiv 2204.07118, Table 1 (ImageNet-1k, 224 pixels, 800 epochs of ViT-S's column):
# 3-Augment, binary cross-entropy, LAMB, LayerScale, no smoothing, no erasing.
DEIT3 = replace(
    DEIT,
    epochs=800,
    batch_size=2048,
    optimizer="lamb",
    lr=4e-3,
    lr_batch=0,
    min_lr=1e-6,
    weight_decay=0.05,
    clip_grad=1.0,
    ema=None,
    loss="bce",
    label_smoothing=0.0,
    drop_path=0.05,
    layer_scale=1e-4,
    policy="3a",
    random_erasing=0.0,
)

# Small data, ours: a few dozen epochs from scratch on tens of thousands of small images. Repeated
# augmentation and the long average of the weights are for longer training. After four passes of
# 10,000 images a DeiT of 4 blocks of 96 channels had 70.5 %; with mixup 0.2 and erasing 0.1 65.3,
# with those and lr 2.5e-4 56.0, with those and lr 2e-3 65.8.
FASHION_MNIST = replace(
    DEIT,
    epochs=20,
    batch_size=64,
    lr=1e-3,
    lr_batch=64,
    warmup_epochs=1.0,
    ema=0.998,
    ema_warmup=True,
    drop_path=0.0,
    repeats=1,
    policy=None,
    color_jitter=0.0,
    crop_scale=(0.7, 1.0),
    random_erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    eval_crop=1.0,
)

# A folder of photographs, ours: from some hundreds of images on, as a rule from trained weights.
FOLDER = replace(
    DEIT,
    epochs=50,
    batch_size=64,
    lr=5e-5,
    lr_batch=64,
    min_lr=1e-6,
    warmup_epochs=2.0,
    ema=0.998,
    ema_warmup=True,
    repeats=1,
    crop_scale=(0.3, 1.0),
)

# FixRes (arXiv 1906.06423): the classifier and the batch norms adapt to images as they are at test
# time, at another resolution; the rest of the network stays (`Options.train_only`).
FIXRES = replace(
    DEIT,
    epochs=10,
    batch_size=256,
    lr=1e-3,
    lr_batch=256,
    min_lr=0.0,
    warmup_epochs=0.0,
    weight_decay=1e-4,
    ema=None,
    drop_path=0.0,
    repeats=1,
    policy=None,
    color_jitter=0.0,
    crop="center",
    random_erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
)

RECIPES: dict[str, Recipe] = {
    "deit": DEIT,
    "deit3": DEIT3,
    "finetune": FINETUNE,
    "fashion-mnist": FASHION_MNIST,
    "folder": FOLDER,
    "fixres": FIXRES,
}


def recipe(name: str, **changes: Any) -> Recipe:
    """The recipe called `name`, with `changes` to its fields.

    Raises ValueError for an unknown recipe, TypeError for an unknown field.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    return replace(RECIPES[name], **changes)
