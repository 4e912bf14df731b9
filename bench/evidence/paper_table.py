"""Table 5 of the DeiT paper as data: quoted accuracies and V100 speeds, never measured here.

The rows stand in table5.csv as printed (arXiv 2012.12877v2, Table 5): one 16 GB V100, fp32, the
largest batch that fits, mean of 30 runs, all models from one timm code base.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

SOURCE = "arXiv 2012.12877v2, Table 5"
PATH = Path(__file__).with_name("table5.csv")

# The paper's name -> timm's, oldest spelling first; the first that the installed timm has is used.
CONVNETS: dict[str, tuple[str, ...]] = {
    "resnet18": ("resnet18",),
    "resnet50": ("resnet50",),
    "resnet101": ("resnet101",),
    "resnet152": ("resnet152",),
    "regnety_4gf": ("regnety_040",),
    "regnety_8gf": ("regnety_080",),
    "regnety_16gf": ("regnety_160",),
    **{f"efficientnet_b{i}": (f"efficientnet_b{i}", f"tf_efficientnet_b{i}") for i in range(9)},
}
FAMILIES = {"resnet": "ResNet", "regnety": "RegNetY", "efficientnet": "EfficientNet"}
VITS = {"vit_b_16": "deit_b", "vit_l_16": "vit_l"}  # the paper's name -> this package's variant


@dataclass(frozen=True)
class Quoted:
    """One row: what the paper printed for one network at one image size."""

    model: str
    img_size: int
    params_m: float
    v100_img_s: float
    top1: float
    distilled: bool
    note: str


@functools.cache
def rows() -> tuple[Quoted, ...]:
    """Every row of the table, in the paper's order."""
    with PATH.open(encoding="utf-8") as file:
        lines = [line for line in file if not line.startswith("#")]
    return tuple(
        Quoted(
            model=row["model"],
            img_size=int(row["img_size"]),
            params_m=float(row["params_m"]),
            v100_img_s=float(row["v100_fp32_img_s"]),
            top1=float(row["imagenet_top1"]),
            distilled=row["distilled"] == "yes",
            note=" ".join(filter(None, (row["epochs"] and f"{row['epochs']} ep", row["recipe"]))),
        )
        for row in csv.DictReader(lines)
    )


def quoted(model: str, img_size: int, *, distilled: bool = False) -> Quoted | None:
    """The first row for a network (of several recipes, the paper's plain one), or None."""
    for row in rows():
        if (row.model, row.img_size, row.distilled) == (model, img_size, distilled):
            return row
    return None


def networks() -> tuple[Quoted, ...]:
    """The first row of every network at every image size, in the paper's order."""
    first: dict[tuple[str, int, bool], Quoted] = {}
    for row in rows():
        first.setdefault((row.model, row.img_size, row.distilled), row)
    return tuple(first.values())


def label(row: Quoted) -> str:
    """The network's name, ⚗ for distilled, ↑ where the image size is not 224."""
    size = "" if row.img_size == 224 else f"↑{row.img_size}"
    return row.model + ("⚗" if row.distilled else "") + size


def recipes(network: Quoted) -> list[Quoted]:
    """Every row of a network: one architecture, trained in several ways."""
    same = lambda row: (row.model, row.img_size, row.distilled)
    return [row for row in rows() if same(row) == same(network)]


def convnet(name: str, option: str = "against") -> Quoted:
    """The row of a convnet of Table 5, by the paper's name or by timm's ("regnety_160").

    Raises ValueError for an unknown name, listing the known ones; `option` is who asked.
    """
    for paper_name, timm_names in CONVNETS.items():
        if name == paper_name or name in timm_names:
            return next(row for row in rows() if row.model == paper_name)
    raise ValueError(f"{option}: unknown convnet {name!r}; known: {', '.join(CONVNETS)}")


def family(model: str) -> str:
    """ "ResNet", "RegNetY", "EfficientNet", "ViT", or "DeiT" for everything else."""
    if model.startswith("vit_"):
        return "ViT"
    return FAMILIES.get(model.partition("_")[0].rstrip("0123456789"), "DeiT")


def nearest_convnets(v100_img_s: float) -> list[str]:
    """The convnet of each family whose quoted speed is nearest on a log scale."""
    if not v100_img_s > 0:
        raise ValueError(f"v100_img_s: expected a positive speed; got {v100_img_s}")
    distance = {name: abs(math.log(convnet(name).v100_img_s / v100_img_s)) for name in CONVNETS}
    return [
        min((name for name in CONVNETS if family(name) == each), key=distance.__getitem__)
        for each in FAMILIES.values()
    ]


def reference_speed(model: str, img_size: int, distilled: bool, flops: dict[int, int]) -> float:
    """A V100 speed for choosing neighbours only: the quoted one, else scaled by FLOPs.

    `flops` maps an image size of this network to its FLOPs and must hold `img_size` and every
    size that the table has for it. A network that the table lacks takes DeiT-B's efficiency.
    """
    exact = quoted(model, img_size, distilled=distilled)
    if exact:
        return exact.v100_img_s
    known = [row for row in rows() if row.model == model and row.img_size in flops]
    if known:
        near = min(known, key=lambda row: abs(row.img_size - img_size))
        return near.v100_img_s * flops[near.img_size] / flops[img_size]
    deit_b_flops_per_s = 292.3 * 35.1e9
    return deit_b_flops_per_s / flops[img_size]
