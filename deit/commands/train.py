"""The commands that train and evaluate; no torch is imported before one runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

from deit.commands import flags
from deit.recipes import RECIPES, Recipe
from deit.training.options import WORKERS, Distillation, Options, Shape


def _may_be_left_out(metavar: str) -> Any:
    """For a flag whose help says itself what happens without it."""
    return flags.arg(metavar=metavar, help_behavior_hint="")


OptionalPath = Annotated[Path | None, _may_be_left_out("PATH")]
OptionalName = Annotated[str | None, _may_be_left_out("NAME")]
OptionalInt = Annotated[int | None, _may_be_left_out("INT")]
OptionalFloat = Annotated[float | None, _may_be_left_out("FLOAT")]
Paths = Annotated[tuple[Path, ...], flags.Positional, _may_be_left_out("PATH ...")]

RecipeName = Literal["deit", "deit3", "finetune", "fashion-mnist", "folder", "fixres"]


def _flag(setting: Any, kind: Any) -> Any:
    """A recipe's setting as a flag; its help shows the value in each recipe."""
    values = {name: _shown(getattr(recipe, setting.name)) for name, recipe in RECIPES.items()}
    usual = values.pop("deit")
    others = ", ".join(f"{name} {value}" for name, value in values.items() if value != usual)
    hint = f"({usual}; {others})" if others else f"({usual})"
    metavar = {float | None: "FLOAT|None", str | None: "NAME|None"}.get(kind)
    note = flags.arg(help=setting.metadata["help"], help_behavior_hint=hint, metavar=metavar)
    return Annotated[kind, note]


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


if TYPE_CHECKING:
    Changes = Mapping[str, Any]
else:  # Recipe's fields as flags that may all be left out: only what is given is in the mapping
    _KINDS = get_type_hints(Recipe)
    Changes = TypedDict(
        "Changes", {s.name: _flag(s, _KINDS[s.name]) for s in fields(Recipe)}, total=False
    )


@dataclass(frozen=True)
class Train:
    """Train a network, with or without a teacher.

    A run that was stopped goes on when the same command is given again.
    """

    data: str
    """A folder (train/CLASS/ and val/CLASS/), fashion-mnist[:FOLDER], wds:SHARDS or hf:NAME."""
    out: Path
    """The run's folder: checkpoints, log and final weights; a run found there is continued."""
    arch: str = "deit_s"
    """deit_ti, deit_s, deit_b, vit_l or timm:NAME."""
    embed_dim: OptionalInt = None
    """Channels, where they are not to be those of `arch`; the next three change its shape, too."""
    depth: OptionalInt = None
    """Blocks."""
    num_heads: OptionalInt = None
    """Heads of the attention; embed_dim / 64 if only that is given."""
    patch_size: OptionalInt = None
    """Pixels along a patch's side."""
    recipe: RecipeName = "deit"
    """Where the settings that no flag changes come from."""
    distill: Literal["none", "soft", "hard"] = "none"
    """What is learned from the teacher: nothing, its probabilities, or its choice."""
    teacher: OptionalName = None
    """A run's folder, timm:NAME (its pretrained weights; timm:NAME=FILE: a file's), or a DeiT's
    weights."""
    distilled: bool = False
    """With the distillation token, which learns from the teacher through a head of its own."""
    alpha: OptionalFloat = None
    """The teacher's share of the loss; if left out 0.5 for hard, 0.1 for soft."""
    temperature: float = 3.0
    """Of both softmaxes in soft distillation."""
    kl_reduction: Literal["batchmean", "numel"] = "batchmean"
    """numel divides the soft loss by the classes too, as the official code does."""
    weights: OptionalName = None
    """Start from these, not afresh: a run's folder, timm:NAME[=FILE] (as for the teacher) for that
    arch, or any file that `deit predict` takes."""
    img_size: int = 224
    """Pixels along a side; position embeddings of `weights` are resized to it."""
    train_only: Literal["all", "classifier"] = "all"
    """classifier: only the classifiers and batch norms learn, as FixRes has it."""
    seed: int = 0
    """Of everything random."""
    device: str = "auto"
    """A torch device; auto is this process's GPU, or the CPU where there is none."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What products are computed in (autocast); weights stay fp32."""
    workers: int = WORKERS
    """Processes that read and augment images."""
    augment_on: Literal["workers", "device"] = "workers"
    """device: workers only crop, and batches are augmented where the network is."""
    accumulate: int = 1
    """Parts of an update that each process takes one after another, to save memory."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: whole copies of the network, or shards of it (FSDP2)."""
    compile: bool = False
    """torch.compile the network."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward: less memory, a third more arithmetic."""
    fuse: bool = True
    """Run on the fused operators; with --no-fuse the network and its loss are PyTorch's own."""
    limit_train: OptionalInt = None
    """Take this many training images, not all."""
    limit_val: OptionalInt = None
    """Evaluate on this many images, not all."""
    eval_every: int = 1
    """Epochs between evaluations."""
    save_every: int = 1
    """Epochs between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    track: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...], flags.arg(help_behavior_hint="")
    ] = ()
    """Where the log's numbers go besides log.jsonl."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a loss that is NaN or infinite does, after its images were named in a file."""
    max_unreadable: float = 0.01
    """The run stops when a larger share of the training images cannot be read."""
    changes: Annotated[Changes, flags.arg(name="recipe's")] = field(default_factory=dict)
    """Each replaces one line of the recipe. In brackets: its value in the recipe `deit`, then in
    the recipes that have another."""

    def options(self) -> Options:
        """What the flags say, as the trainer takes it."""
        own = {f.name for f in fields(Options)} & {f.name for f in fields(self)} - {"recipe"}
        return Options(
            recipe=replace(RECIPES[self.recipe], **self.changes),
            distillation=Distillation(
                self.distill, self.alpha, self.temperature, self.kl_reduction
            ),
            shape=Shape(self.embed_dim, self.depth, self.num_heads, self.patch_size),
            **{name: getattr(self, name) for name in own},
        )

    def run(self) -> int:
        """Train; 0 at the end, and after a signal with a checkpoint written."""
        from deit.training.trainer import train

        train(self.options())
        return 0


@dataclass(frozen=True)
class Finetune(Train):
    """Train on from weights, as a rule at a higher resolution: both labels stay in the loss.

    The teacher should be brought to the same resolution first: `deit fixres`.
    """

    recipe: RecipeName = "finetune"
    img_size: int = 384


@dataclass(frozen=True)
class Fixres(Train):
    """Adapt a trained network's classifier and batch norms to another resolution (FixRes)."""

    recipe: RecipeName = "fixres"
    img_size: int = 384
    train_only: Literal["all", "classifier"] = "classifier"


@dataclass(frozen=True)
class Eval:
    """Top-1 of a network on labelled images, for each of its heads."""

    weights: flags.Positional[Path]
    """A run's folder, a weights' file in it (average.safetensors), or a DeiT's weights."""
    data: str
    """As for `deit train`; the val part is taken."""
    img_size: OptionalInt = None
    """Pixels along a side; the network's own if left out."""
    batch_size: int = 64
    """Images at a time."""
    limit: OptionalInt = None
    """Evaluate on this many images, not all."""
    device: str = "auto"
    """A torch device; auto is the first GPU, or the CPU where there is none."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What products are computed in (autocast)."""
    workers: int = WORKERS
    """Processes that read images."""
    fuse: bool = True
    """Run on the fused operators."""
    json: bool = False
    """Print one JSON document instead of text."""

    def run(self) -> int:
        """Evaluate and print."""
        from deit.training.evaluation import run

        return run(self)


@dataclass(frozen=True)
class Report:
    """Compare runs: a table of their last scores, and curves."""

    runs: Paths
    """Runs' folders."""
    out: OptionalPath = None
    """Draw loss, top-1 by head and pace into this file, too (.svg, .png or .pdf)."""

    def run(self) -> int:
        """Print and draw."""
        from deit.training.report import run

        return run(self)


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
        """Draw."""
        from deit.attention_maps import run

        return run(self)


@dataclass(frozen=True)
class Export:
    """Write a trained network for other programs, and compare the file with the network."""

    weights: flags.Positional[Path]
    """A run's folder, or a DeiT's weights."""
    out: Path
    """The file: .safetensors, .pt2 or .onnx."""
    format: Literal["safetensors", "torch", "onnx", "aoti"] = "safetensors"
    """safetensors with a model card, torch.export, ONNX, or AOTInductor with fused operators."""

    def run(self) -> int:
        """Write and compare."""
        from deit.weights.export import run

        return run(self)
