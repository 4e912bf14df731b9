"""The variants of DeiT as one table, and the names users call them by."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_WHOLE = ("embed_dim", "num_heads", "depth", "img_size", "num_classes", "patch_size", "in_chans",
          "mlp_ratio")  # fmt: skip
DEEPEST = 1000  # blocks; the deepest published vision transformers have 48


@dataclass(frozen=True)
class Config:
    """One network: everything its shape depends on.

    Head dimension 64, patch 16, MLP ratio 4, LayerNorm eps 1e-6 and qkv bias are the same for
    all (arXiv 2012.12877, section 5.1 and Table 1; vit_l: arXiv 2010.11929, Table 1).
    `layer_scale`: None for none, else what LayerScale starts from (arXiv 2103.17239, eq. 4).
    """

    name: str
    embed_dim: int
    num_heads: int
    depth: int = 12
    distilled: bool = False
    img_size: int = 224
    num_classes: int = 1000
    patch_size: int = 16
    in_chans: int = 3
    mlp_ratio: int = 4
    eps: float = 1e-6
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name}: expected an int; got {value!r}")
        for name in ("embed_dim", "depth", "num_classes", "patch_size", "in_chans", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        if self.depth > DEEPEST:
            raise ValueError(f"depth: expected at most {DEEPEST}; got {self.depth}")
        if not (isinstance(self.eps, (int, float)) and 0 <= self.eps <= 1):
            raise ValueError(f"eps: expected a number from 0 to 1; got {self.eps!r}")
        scale = self.layer_scale
        if not (scale is None or (isinstance(scale, (int, float)) and math.isfinite(scale))):
            raise ValueError(f"layer_scale: expected a finite number or None; got {scale!r}")
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim={self.embed_dim}; got {self.num_heads}"
            )
        if self.img_size < self.patch_size or self.img_size % self.patch_size:
            raise ValueError(
                f"img_size: expected a positive multiple of the patch size {self.patch_size}; "
                f"got {self.img_size}"
            )

    @property
    def prefix_tokens(self) -> int:
        """The class token, and the distillation token where there is one."""
        return 2 if self.distilled else 1

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.img_size // self.patch_size

    @property
    def tokens(self) -> int:
        """N, prefix tokens included."""
        return self.prefix_tokens + self.grid**2

    @property
    def label(self) -> str:
        """Short name with ⚗ for distilled and ↑ for a resolution other than 224."""
        size = "" if self.img_size == 224 else f"↑{self.img_size}"
        return self.name + ("⚗" if self.distilled else "") + size

    @property
    def flops(self) -> int:
        """Floating-point operations of one image's forward pass, two a multiply-add.

        The matrix products only: patch projection, qkv, scores, mixing, projection, MLP, heads.
        """
        n, d = self.tokens, self.embed_dim
        block = n * d * d * (3 + 1 + 2 * self.mlp_ratio) + 2 * n * n * d
        patches = self.grid**2 * d * self.in_chans * self.patch_size**2
        heads = self.prefix_tokens * d * self.num_classes
        return 2 * (self.depth * block + patches + heads)


VARIANTS: dict[str, Config] = {
    "deit_ti": Config("deit_ti", embed_dim=192, num_heads=3),
    "deit_s": Config("deit_s", embed_dim=384, num_heads=6),
    "deit_b": Config("deit_b", embed_dim=768, num_heads=12),
    "vit_l": Config("vit_l", embed_dim=1024, num_heads=16, depth=24),
}

# What may be changed of a variant's shape, for images or budgets that no published one fits.
SHAPE = ("embed_dim", "depth", "num_heads", "patch_size")

# Other published networks, by what their weights' shapes say: DeiT III's, ViT-H.
_OTHERS = (
    Config("deit_m", embed_dim=512, num_heads=8),
    Config("vit_h", embed_dim=1280, num_heads=16, depth=32, patch_size=14),
)
_PATCHES = (8, 14, 16, 32)  # pixels of theirs


def published(width: int, depth: int, patch_size: int, mlp_ratio: int) -> Config | None:
    """The published network that has this shape, whatever its images and classes, and so its
    number of heads; None for no such."""
    if patch_size not in _PATCHES or mlp_ratio != 4:
        return None
    known = (*VARIANTS.values(), *_OTHERS)
    return next((c for c in known if (c.embed_dim, c.depth) == (width, depth)), None)


# timm's and the official repository's words for the same networks.
_SIZES = {
    "deit_tiny": "deit_ti",
    "deit_small": "deit_s",
    "deit_base": "deit_b",
    "vit_base": "deit_b",
    "vit_large": "vit_l",
}
_PATTERN = re.compile(
    r"(?P<base>[a-z]+_[a-z]+?)(?P<distilled>_distilled)?(_patch16)?(_(?P<size>\d+))?"
)

# The eight networks with published weights, by timm's names.
PUBLISHED: tuple[str, ...] = tuple(
    f"deit_{size}{distilled}_patch16_{pixels}"
    for pixels, sizes in ((224, ("tiny", "small", "base")), (384, ("base",)))
    for size in sizes
    for distilled in ("", "_distilled")
)


def known_names() -> list[str]:
    """Names that `config` accepts, apart from further image sizes."""
    short = [f"{name}{suffix}" for name in VARIANTS for suffix in ("", "_distilled")]
    return [*short, "deit_b_384", "deit_b_distilled_384", *PUBLISHED]


def config(
    arch: str,
    *,
    distilled: bool | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
) -> Config:
    """The configuration called `arch`, with what is given replaced.

    Args:
        arch: a variant ("deit_ti", "deit_s", "deit_b", "vit_l"), optionally followed by
            "_distilled" and an image size ("deit_b_distilled_384"), or timm's name
            ("deit_base_distilled_patch16_384").
        distilled: with the distillation token and its head; None for what `arch` says.
        img_size: pixels, a multiple of 16; None for what `arch` says, else 224.
        num_classes: None for 1000.

    Raises:
        ValueError: an unknown name, with the nearest known ones; an impossible size.
    """
    match = _PATTERN.fullmatch(arch)
    base = match and _SIZES.get(match["base"], match["base"])
    if match is None or base not in VARIANTS:
        near = difflib.get_close_matches(arch, known_names(), n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"arch: unknown name {arch!r}{hint}; known: {', '.join(known_names())}")
    if distilled is None:
        distilled = match["distilled"] is not None
    if img_size is None:
        img_size = int(match["size"] or 224)
    return replace(
        VARIANTS[base],
        distilled=distilled,
        img_size=img_size,
        num_classes=1000 if num_classes is None else num_classes,
    )


def reshaped(
    arch: str,
    *,
    img_size: int,
    num_classes: int,
    distilled: bool,
    shape: Mapping[str, int],
) -> Config:
    """The configuration of a variant with its shape changed: `shape` has names of SHAPE.

    Heads are of 64 channels, which is what the kernels are made for, where `shape` has channels
    without heads. Raises ValueError for an unknown name or an impossible shape.
    """
    settings = config(arch, distilled=distilled or None, num_classes=num_classes)
    changes: dict[str, Any] = dict(shape)
    if "embed_dim" in changes and "num_heads" not in changes:
        changes["num_heads"] = max(1, changes["embed_dim"] // 64)
    return replace(settings, img_size=img_size, **changes)
