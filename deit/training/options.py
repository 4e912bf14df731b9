"""What one training run is told, besides its recipe. No torch here: the command line reads it."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

from deit.recipes import DEIT, Recipe
from deit.settings import allowed, refused, said

WORKERS = min(4, os.cpu_count() or 1)  # more than there are cores, and PyTorch warns


@dataclass(frozen=True)
class Shape:
    """Changes to a variant's shape, for images or budgets that no published variant fits."""

    embed_dim: int | None = refused(
        None,
        "Channels, where they are not to be those of `arch`; the next three change its shape, too.",
    )
    depth: int | None = refused(None, "Blocks.")
    num_heads: int | None = refused(
        None, "Heads of the attention; embed_dim / 64 if only that is given."
    )
    patch_size: int | None = refused(None, "Pixels along a patch's side.")

    def changes(self) -> dict[str, int]:
        """The fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Distillation:
    """How a student learns from its teacher, with the paper's values as defaults (section 4).

    With a distillation token the class head learns the labels and the distillation head the
    teacher; without one, the class head learns both.
    """

    kind: Literal["none", "soft", "hard"] = said(
        "none",
        "What is learned from the teacher: nothing, its probabilities, or its choice.",
        flag="distill",
        before="teacher",
    )
    alpha: float | None = said(
        None, "The teacher's share of the loss; if left out 0.5 for hard, 0.1 for soft."
    )
    temperature: float = said(3.0, "Of both softmaxes in soft distillation.")
    kl_reduction: Literal["batchmean", "numel"] = said(
        "batchmean", "numel divides the soft loss by the classes too, as the official code does."
    )


@dataclass(frozen=True)
class Options:
    """One run: the recipe says how, this says what, where and with which means.

    Each line makes a flag of `deit train` and a rule for a run that is given again.

    Raises ValueError for options that contradict each other.
    """

    # What is trained, and on what.
    data: str = refused(
        MISSING,
        "A folder (train/CLASS/ and val/CLASS/), fashion-mnist[:FOLDER], wds:SHARDS or hf:NAME.",
    )
    out: Path = allowed(  # noqa: RUF009
        MISSING,
        "The run's folder: checkpoints, log and final weights; a run found there is continued.",
    )
    arch: str = refused("deit_s", "deit_ti, deit_s, deit_b, vit_l or timm:NAME.")
    shape: Shape = field(default_factory=Shape)
    # How it is learned.
    recipe: Recipe = DEIT  # on the command line its name, and a flag for each of its lines
    teacher: str | None = said(
        None,
        "A run's folder, timm:NAME (its pretrained weights; timm:NAME=FILE: a file's), or a "
        "DeiT's weights.",
    )
    distilled: bool = refused(
        False,
        "With the distillation token, which learns from the teacher through a head of its own.",
    )
    distillation: Distillation = Distillation()
    weights: str | None = refused(  # where a run began; a checkpoint takes their place
        None,
        "Start from these, not afresh: a run's folder, timm:NAME[=FILE] (as for the teacher) for "
        "that arch, or any file that `deit predict` takes.",
    )
    img_size: int = refused(
        224, "Pixels along a side; position embeddings of `weights` are resized to it."
    )
    train_only: Literal["all", "classifier"] = refused(
        "all", "classifier: only the classifiers and batch norms learn, as FixRes has it."
    )
    seed: int = refused(0, "Of everything random.")
    # By which means: the same to rounding, but not to the bit.
    device: str = said(
        "auto", "A torch device; auto is this process's GPU, or the CPU where there is none."
    )
    dtype: Literal["fp32", "bf16", "fp16"] = said(
        "fp32", "What products are computed in (autocast); weights stay fp32."
    )
    workers: int = allowed(WORKERS, "Processes that read and augment images.")
    augment_on: Literal["workers", "device"] = said(
        "workers", "device: workers only crop, and batches are augmented where the network is."
    )
    accumulate: int = said(
        1, "Parts of an update that each process takes one after another, to save memory."
    )
    parallel: Literal["ddp", "fsdp"] = said(
        "ddp", "With several processes: whole copies of the network, or shards of it (FSDP2)."
    )
    compile: bool = said(False, "torch.compile the network.")
    checkpoint_activations: bool = said(
        False, "Recompute each block in the backward: less memory, a third more arithmetic."
    )
    fuse: bool = said(
        True,
        "Run on the fused operators; with --no-fuse the network and its loss are PyTorch's own.",
    )
    # How much of the data, what is kept and what is shown.
    limit_train: int | None = refused(None, "Take this many training images, not all.")
    limit_val: int | None = said(None, "Evaluate on this many images, not all.")
    eval_every: int = allowed(1, "Epochs between evaluations.")
    save_every: int = allowed(1, "Epochs between checkpoints.")
    keep: int = allowed(2, "Checkpoints kept.")
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = allowed(
        (), "Where the log's numbers go besides log.jsonl."
    )
    on_nan: Literal["stop", "skip"] = said(
        "stop", "What a loss that is NaN or infinite does, after its images were named in a file."
    )
    max_unreadable: float = said(
        0.01, "The run stops when a larger share of the training images cannot be read."
    )

    def __post_init__(self) -> None:
        for name in ("accumulate", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        if not 0.0 <= self.max_unreadable <= 1.0:
            raise ValueError(f"max_unreadable: expected in [0, 1]; got {self.max_unreadable}")
        if (self.teacher is None) != (self.distillation.kind == "none"):
            raise ValueError(
                "teacher: expected a teacher with soft or hard distillation, and none without; "
                f"got teacher {self.teacher} and distillation {self.distillation.kind}"
            )
