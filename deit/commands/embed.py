"""`deit embed`: the embeddings of a collection of photographs, as Parquet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deit.commands import flags

if TYPE_CHECKING:
    from deit.batch import Model


@dataclass(frozen=True)
class Embed:
    """Write the embedding of every photograph of a collection into Parquet files.

    A row is a path, the normalised class token (of a distilled network the mean of its two
    tokens), and an error where the photograph could not be read. A run that was killed goes on
    when it is given again, with no row lost or doubled. Exits with 1 if a photograph could not be
    read, with 2 for bad input.
    """

    images: flags.Inputs = ()
    """Folders, files, globs in quotes, and WebDataset shards (photos/, 'a/**/*.jpg',
    'shards/{000..146}.tar', https://...)."""
    out: flags.OptionalPath = None
    """The folder to write into: a new one, or that of the same run."""
    list: flags.OptionalPath = None
    """A text file with one path a line, after the images given."""
    weights: flags.OptionalPath = None
    """The trained weights: a run's folder, an official .pth, a .safetensors, or a Hugging Face
    model folder."""
    arch: flags.OptionalName = None
    """The network, such as deit_b or deit_tiny_distilled_patch16_224; left out: the weights'."""
    img_size: flags.OptionalInt = None
    """Pixels along a side, a multiple of 16; the weights' own if left out."""
    token: Literal["mean", "class", "distillation"] = "mean"
    """Of a distilled network: the mean of its two tokens, or one of them."""
    device: str = "auto"
    """A torch device; auto is the first GPU, or the CPU where there is none."""
    dtype: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32"
    """What the network computes in."""
    batch_size: int = 32
    """Photographs at a time."""
    fuse: bool = True
    """Run on the fused operators."""
    threads: flags.OptionalInt = None
    """Threads of the network; torch's own number if left out."""
    workers: flags.OptionalInt = None
    """Processes that decode; one a usable core, at most 16, if left out."""
    rows: flags.OptionalInt = None
    """Rows of a Parquet file, a multiple of the batch size; about 4096 if left out."""
    decode: Literal["exact", "fast", "scaled"] = "exact"
    """fast: resized by vector instructions, 0.3 % of the values differ by 1 of 255; scaled: large
    JPEGs decoded smaller, too, by 0.2 of 255 on average."""

    def run(self) -> int:
        """Returns 0, or 1 if an image could not be read. Raises ValueError for bad input."""
        from deit.batch import Model

        model = Model(
            required("weights", self.weights),
            self.arch,
            "embedding",
            self.dtype,
            self.device,
            self.threads,
            img_size=self.img_size,
            test_head="logit-mean" if self.token == "mean" else self.token,
            batch_size=self.batch_size,
            decode=self.decode,
            fused=self.fuse,
        )
        out = required("out", self.out)
        return written(model, self.images, self.list, out, rows=self.rows, workers=self.workers)


def required(name: str, value: Path | None) -> Path:
    """A flag that has to be given; tyro would show the whole help for one that is not."""
    if value is None:
        raise ValueError(f"--{name}: expected a path; got none")
    return value


def written(
    model: Model,
    images: Sequence[str],
    listed: Path | None,
    out: Path,
    *,
    rows: int | None,
    workers: int | None,
    topk: int | None = None,
) -> int:
    """`deit.batch.run` with its pace on stderr. Returns 0, or 1 if an image could not be read."""
    from deit.batch import Inputs, run
    from deit.training.progress import Watch, human

    inputs = Inputs(images, listed)
    how = f"{model.config.label} at {model.config.img_size} px, {model.dtype} on {model.device}"
    print(f"deit: {how}, {'fused' if model.fused else 'not fused'}; into {out}", file=sys.stderr)
    watch = Watch(True)
    try:
        done = run(model, inputs, out, topk=topk, rows=rows, workers=workers, watch=watch)
    finally:
        watch.close()
    said = f"{done.rows:,} rows in {out}, {done.made:,} of them now"
    if done.made:
        share = 100 * done.waited / done.seconds
        said += (
            f" in {human(done.seconds)}: {done.made / done.seconds:.1f} images/s, "
            f"{share:.0f} % of the time waiting for decoding"
        )
    print(f"deit: {said}", file=sys.stderr)
    if done.unreadable:
        print(f"deit: {done.unreadable:,} could not be read: see `error`", file=sys.stderr)
    return 1 if done.unreadable else 0
