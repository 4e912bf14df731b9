"""How far our logits are from timm's, transformers' and torchvision's on the same weights.

    python bench/parity.py                 # a table of all eight published DeiTs
    python bench/parity.py --json out.json

Each reference network gets random weights that give logits of about unit scale (fresh ones give
logits near zero, which any two networks share), `deit.load` reads them, and both see the same
images, in fp32 on the CPU. The bound is 2e-5: fp32 rounding through 12 blocks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import deit
import evidence
from deit.commands import flags
from deit.fused_vit import fuse

if TYPE_CHECKING:
    from rich.table import Table

BOUND = 2e-5

# Hugging Face transformers names its keys one way in memory and another on disk.
TRANSFORMERS = ("HF in memory", "HF on disk")
FUSED = "timm, fused"
# LayerScale, and no positions for the class token.
DEIT3 = ("deit3_small_patch16_224", "deit3_base_patch16_384", "deit3_large_patch16_224")


@dataclass(frozen=True)
class Row:
    """One comparison: the largest absolute difference of the logits, and the logits' deviation."""

    network: str
    reference: str
    delta: float
    logit_std: float


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, in place, so that activations and logits are of unit scale.

    Matrices get variance 1/fan_in; LayerNorms, biases, tokens and positions get what is neither
    0 nor 1, so that one exchanged or left out shows. Returns the network in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.dim() in (2, 4):
                parameter.mul_(parameter[0].numel() ** -0.5)
            else:
                parameter.mul_(0.1)
            if name.endswith("weight") and parameter.dim() == 1:
                parameter.add_(1.0)
    return network.eval()


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """`make`'s network with `randomise`d weights; its own initialisation is skipped."""
    with torch.device("meta"):
        network = make()
    buffers = [name for name, _ in network.named_buffers()]
    if buffers:
        raise RuntimeError(f"buffers that random weights would not fill: {buffers}")
    return randomise(network.to_empty(device="cpu"), seed)


def images_for(settings: deit.Config, seed: int = 1) -> Tensor:
    """One normalised random image, [1, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, settings.img_size, settings.img_size, generator=generator)


def compare(label: str, reference: str, theirs: Tensor, ours: nn.Module, images: Tensor) -> Row:
    """The row of two networks' logits on `images`."""
    with torch.inference_mode():
        logits = ours(images)
    delta = (logits - theirs).abs().max().item()
    return Row(label, reference, delta, theirs.std().item())


def against_timm(name: str) -> Iterator[Row]:
    """Our network, plain then fused, against timm's, by timm's way of joining the heads."""
    import timm

    network = build(lambda: timm.create_model(name))
    ours = deit.load(network.state_dict(), test_head="logit-mean")
    images = images_for(ours.config)
    with torch.inference_mode():
        theirs = network(images)
    yield compare(name, "timm", theirs, ours, images)
    fuse(ours)
    yield compare(name, FUSED, theirs, ours, images)


def transformers_network(kind: str, settings: deit.Config, **changes: object) -> nn.Module:
    """A transformers network of class `kind`, in `settings`' shape, with random weights."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    family = transformers.ViTConfig if kind.startswith("ViT") else transformers.DeiTConfig
    config = family(
        hidden_size=settings.embed_dim,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.num_heads,
        intermediate_size=settings.mlp_ratio * settings.embed_dim,
        image_size=settings.img_size,
        num_labels=settings.num_classes,
        **changes,
    )
    return build(lambda: getattr(transformers, kind)(config))


def against_transformers(name: str, kind: str | None = None) -> Iterator[Row]:
    """Against transformers' network, its keys as in memory and as in a saved folder."""
    settings = deit.config(name)
    label = name if kind is None else "  its class head alone"
    if kind is None:
        distilled, plain = "DeiTForImageClassificationWithTeacher", "ViTForImageClassification"
        kind = distilled if settings.distilled else plain
    network: Any = transformers_network(kind, settings)
    images = images_for(settings)
    with torch.inference_mode():
        theirs = network(images).logits
    # DeiTForImageClassification has the distillation token and no classifier for it
    test_head = "class" if kind == "DeiTForImageClassification" else "logit-mean"
    ours = deit.load(network.state_dict(), test_head=test_head)
    yield compare(label, TRANSFORMERS[0], theirs, ours, images)
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        ours = deit.load(folder, test_head=test_head)
    yield compare(label, TRANSFORMERS[1], theirs, ours, images)


def against_torchvision(name: str) -> Row:
    """Against torchvision's vit_b_16 or vit_l_16."""
    import torchvision

    network = build(getattr(torchvision.models, name))
    ours = deit.load(network.state_dict())
    images = images_for(ours.config)
    with torch.inference_mode():
        theirs = network(images)
    return compare(name, "torchvision", theirs, ours, images)


def rows() -> Iterator[Row]:
    """All comparisons, each as it is made."""
    for name in deit.PUBLISHED:
        yield from against_timm(name)
        yield from against_transformers(name)
        if name == "deit_tiny_distilled_patch16_224":
            yield from against_transformers(name, kind="DeiTForImageClassification")
    for name in DEIT3:
        yield from against_timm(name)
    yield against_torchvision("vit_b_16")
    yield against_torchvision("vit_l_16")


def versions() -> dict[str, str]:
    """What was compared with what."""
    import timm
    import torchvision
    import transformers

    modules = (deit, torch, timm, transformers, torchvision)
    return {module.__name__: module.__version__ for module in modules}


def tabulate(found: list[Row]) -> Table:
    """One line a network, one column a reference."""
    from rich import box
    from rich.table import Table

    columns = ["timm", FUSED, *TRANSFORMERS, "torchvision"]
    title = "max |Δ| of the logits, fp32, same weights and images"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("network", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    deltas: dict[str, dict[str, str]] = {}
    for row in found:
        cell = f"{row.delta:.1e}" if row.delta else "0"
        deltas.setdefault(row.network.replace("_patch16", ""), {})[row.reference] = cell
    for network, cells in deltas.items():
        table.add_row(network, *(cells.get(column, "") for column in columns))
    return table


@dataclass(frozen=True)
class Options:
    """Compare every published network's logits with timm's and transformers'."""

    json: Path | None = None
    """Also write the rows to this file."""


def main(json: Path | None = None) -> int:
    """Print the table of all networks; 1 if a difference is over the bound.

    json: also write the rows to this file.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console()
    total = 4 * len(deit.PUBLISHED) + 2 + 2 * len(DEIT3) + 2
    found = list(track(rows(), "comparing", total, console=Console(stderr=True), transient=True))
    console.print(tabulate(found))
    worst = max(row.delta for row in found)
    used = versions()
    listed = ", ".join(f"{name} {version}" for name, version in used.items())
    low, high = min(row.logit_std for row in found), max(row.logit_std for row in found)
    console.print(
        f"largest {worst:.1e}, bound {BOUND:.0e}; logits' deviation {low:.2f} to {high:.2f}; "
        f"{listed}",
        highlight=False,
    )
    if json is not None:
        record = {"date": evidence.now(), "bound": BOUND, "versions": used}
        evidence.save(json, {**record, "rows": list(map(asdict, found))})
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main(flags.parse(Options, None, __doc__).json))
