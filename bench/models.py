"""What `fuse` makes of the ViTs of timm and transformers: docs/models.md.

    python bench/models.py                   # the tables, printed
    python bench/models.py --write           # into docs/models.md
    python bench/models.py --check           # exit status 1 where docs/models.md says otherwise
    python bench/models.py --only eva02 clip

Every architecture of timm that has vit, deit, eva, dino, siglip or clip in its name, and the vision
towers of transformers, are made on the meta device and fused: no weights, no memory, some two
minutes. Where another version of a library is installed than the file is of, nothing is checked.
"""

from __future__ import annotations

import difflib
import gc
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deit.commands import flags
from deit.fused_vit import fuse
from deit.fused_vit.blocks import FusedBlock
from deit.fused_vit.modules import Fused, FusedNorm
from deit.fused_vit.report import Report

FILE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
WORDS = ("vit", "deit", "eva", "dino", "siglip", "clip")
# The vision towers of transformers that are ViTs, by model type.
TRANSFORMERS = (
    "aimv2_vision_model", "beit", "clip_vision_model", "data2vec-vision", "deit", "dinov2",
    "dinov2_with_registers", "dinov3_vit", "ijepa", "metaclip_2", "pixio",
    "siglip2_vision_model", "siglip_vision_model", "vit", "vit_mae", "vit_msn", "vivit",
)  # fmt: skip
VERDICTS = {
    "whole": "whole: every transformer block runs fused, with its additions in the products",
    "in part": "in part: attentions, MLPs or norms run fused, the blocks around them do not",
    "norms": "norms alone: LayerNorms or RMSNorms run fused, no attention and no MLP",
    "not": "not: nothing of it is known",
}


@dataclass(frozen=True)
class Options:
    """What to do with the tables."""

    write: bool = False
    """write docs/models.md"""
    check: bool = False
    """compare docs/models.md with what is found"""
    only: tuple[str, ...] = ()
    """only the architectures with one of these words in their names; printed"""


@dataclass(frozen=True)
class Kind:
    """What architectures with the same result share."""

    library: str
    verdict: str
    model: str  # the class
    reason: str


def architectures(only: Sequence[str] = ()) -> list[str]:
    """timm's, by name."""
    import timm

    names = [name for name in timm.list_models() if any(word in name for word in WORDS)]
    return [name for name in names if not only or any(word in name for word in only)]


def of_timm(name: str) -> Kind:
    """What becomes of an architecture of timm."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    return judged("timm", model)


def of_transformers(model_type: str) -> Kind:
    """What becomes of transformers' model of a type, as its configuration makes it."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    return judged("transformers", model)


def judged(library: str, model: nn.Module) -> Kind:
    """The verdict on a model, and the reason where it is not "whole"."""
    name = type(model).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nothing could be fused" is a verdict here
        report = fuse(model)
    kinds = [module for module in model.modules() if isinstance(module, Fused)]
    blocks = sum(isinstance(module, FusedBlock) for module in kinds)
    parts = sum(not isinstance(module, (FusedBlock, FusedNorm)) for module in kinds)
    left = [module for module in _blocks(model) if not isinstance(module, FusedBlock)]
    if blocks and not left:
        verdict = "whole"
    elif blocks or parts:
        verdict = "in part"
    else:
        verdict = "norms" if kinds else "not"
    return Kind(library, verdict, name, "" if verdict == "whole" else _reason(report))


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks, by where the libraries keep them; none of a convolutional stem."""
    for name, module in model.named_modules():
        listed = isinstance(module, (nn.Sequential, nn.ModuleList))
        if listed and name.rpartition(".")[2] in ("blocks", "layers", "layer"):
            yield from (each for each in module.children() if any(map(_attends, each.modules())))


def _attends(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _reason(report: Report) -> str:
    """The most telling of what was left: products and convolutions alone say nothing."""
    notes: Counter[str] = Counter()
    for row in report.rows:
        if row.name and not row.fused and " alone: " not in row.note:
            _, apart, unknown = row.note.partition(": no fused form")
            notes[f"{row.kind}: {'no fused form' + unknown if apart else row.note}"] += 1

    def rank(note: str) -> tuple[bool, bool, int]:
        kind = note.partition(":")[0]
        block = any(word in kind for word in ("Block", "Layer", "Attention", "Mlp", "MLP"))
        return note.endswith("of this class"), not block or "Norm" in kind, -notes[note]

    return min(notes, key=rank, default="convolutions and products alone")


def found(only: Sequence[str] = ()) -> dict[Kind, list[str]]:
    """By result, the architectures that have it."""
    groups: dict[Kind, list[str]] = {}
    for name in architectures(only):
        groups.setdefault(of_timm(name), []).append(name)
        gc.collect(0)
    for name in TRANSFORMERS:
        if not only or any(word in name for word in only):
            groups.setdefault(of_transformers(name), []).append(name)
    return groups


def versions() -> str:
    """The line that says of which libraries the tables are."""
    import timm
    import transformers

    return f"Of timm {timm.__version__} and transformers {transformers.__version__}."


def markdown(groups: dict[Kind, list[str]]) -> str:
    """docs/models.md."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind, names in groups.items():
        counts[kind.library, kind.verdict] += len(names)
    lines = ["# Models", "", *_ABOUT, "", versions(), ""]
    lines += ["| | timm | transformers |", "|---|---|---|"]
    for verdict, meaning in VERDICTS.items():
        figures = [str(counts[library, verdict]) for library in ("timm", "transformers")]
        lines.append(f"| {meaning} | {' | '.join(figures)} |")
    for library in ("timm", "transformers"):
        lines += ["", f"## {library}", "", "| | class | why not | |", "|---|---|---|---|"]
        order = sorted(groups.items(), key=lambda item: (list(VERDICTS).index(item[0].verdict),
                                                         item[0].model, item[1][0]))  # fmt: skip
        for kind, names in order:
            if kind.library == library:
                cells = (kind.verdict, kind.model, kind.reason.replace("|", "\\|"))
                lines.append(f"| {' | '.join(cells)} | {' '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


_ABOUT = """\
What `fuse(model)` makes of each: every architecture of timm with vit, deit, eva, dino, siglip or
clip in its name, and the vision towers of transformers, tried on the meta device. One line is a
class of models with one result. Written by `make models`. For your model, at your sizes,
`print(fuse(model))` says the same of every module.""".splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0; 1 where --check finds another table."""
    options = flags.parse(Options, arguments, __doc__)
    written = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    if options.check and versions() not in written:
        print(f"skipped: docs/models.md is of other versions than these. {versions()}")
        return 0
    text = markdown(found(options.only))
    if options.check:
        difference = list(difflib.unified_diff(written.splitlines(), text.splitlines(),
                                               "docs/models.md", "found", lineterm=""))  # fmt: skip
        print("\n".join(difference) or "docs/models.md is current")
        return 1 if difference else 0
    if options.write:
        FILE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
