"""`deit predict`: the likeliest classes of photographs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deit.commands import flags
from deit.commands.embed import required, written

if TYPE_CHECKING:
    from deit.data.images import Unreadable
    from deit.model import DeiT
    from deit.predict import Prediction


@dataclass(frozen=True)
class Predict:
    """Name what photographs show: the likeliest classes of each, with their probabilities.

    Exits with 1 if an image could not be read (the others are still printed), with 2 for bad
    input.
    """

    images: flags.Inputs = ()
    """Photographs, or folders of them; with --out also globs in quotes and WebDataset shards, as
    `deit embed` takes them."""
    out: flags.OptionalPath = None
    """Write Parquet into this folder instead of text: path, class ids, scores, and an error where
    a photograph could not be read. Given again after a kill, it goes on."""
    list: flags.OptionalPath = None
    """With --out: a text file with one path a line, after the images given."""
    weights: flags.OptionalPath = None
    """The trained weights: a run's folder, an official .pth, a .safetensors, or a Hugging Face
    model folder."""
    arch: flags.OptionalName = None
    """The network, such as deit_b or deit_tiny_distilled_patch16_224; left out: the weights'."""
    img_size: flags.OptionalInt = None
    """Pixels along a side, a multiple of 16; the weights' own if left out."""
    test_head: Literal["class", "distillation", "softmax-sum", "logit-mean"] = "softmax-sum"
    """Of a distilled network: one head, the softmaxes' sum (the paper's) or the logits' mean."""
    topk: int = 5
    """Classes to print for each photograph."""
    classes: flags.OptionalPath = None
    """A text file with one class name a line; a run's own classes or ImageNet's if left out."""
    device: str = "auto"
    """A torch device; auto is the first GPU, or the CPU where there is none."""
    dtype: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32"
    """What the network computes in."""
    batch_size: int = 16
    """Photographs at a time."""
    fuse: bool = True
    """Run on the fused operators."""
    json: bool = False
    """Print one JSON document instead of text."""
    threads: flags.OptionalInt = None
    """Threads of the network; torch's own number if left out."""
    workers: flags.OptionalInt = None
    """Processes that decode; chosen by the cores and the number of images if left out."""
    rows: flags.OptionalInt = None
    """With --out: rows of a Parquet file, a multiple of the batch size; about 4096 if left out."""
    decode: Literal["exact", "fast", "scaled"] = "exact"
    """With --out: as for `deit embed`."""

    def run(self) -> int:
        """Predictions to stdout, all else to stderr.

        Returns 0, or 1 if an image could not be read. Raises ValueError for bad input.
        """
        if self.out is not None:
            return self._written(self.out)
        if self.list is not None or self.rows is not None or self.decode != "exact":
            raise ValueError("--list, --rows, --decode: they go with --out")
        import torch

        from deit import devices
        from deit.data.images import IMAGENET_MEAN, IMAGENET_STD, NothingReadable, PhotoLoader
        from deit.fused_vit import eight_bits, fuse
        from deit.predict import class_names, predict
        from deit.weights import networks

        bits = self.dtype if self.dtype in eight_bits.KINDS else None
        dtype = torch.float32 if bits else devices.DTYPES[self.dtype]
        if bits and not self.fuse:
            raise ValueError(f"--dtype: {bits} is of the fused operators; got --no-fuse")
        if self.threads is not None:
            if self.threads < 1:
                raise ValueError(f"--threads: expected at least 1; got {self.threads}")
            torch.set_num_threads(self.threads)
        paths, failed = _find([Path(each) for each in self.images])
        device = devices.named(self.device)
        model, about = self._load()
        model.to(device, dtype)
        names = about.get("classes")
        if names is None or self.classes is not None:
            names = class_names(model.config.num_classes, self.classes)
        if self.fuse:
            fuse(model, dtype=bits)
        size = model.config.img_size
        how = f"{model.config.label} at {size} px, {self.dtype} on {device}"
        how += ", fused" if self.fuse else ", not fused"
        print(f"deit: {how}; {len(paths)} image{'s' * (len(paths) != 1)}", file=sys.stderr)
        predictions: list[Prediction] = []
        if paths:
            loader = PhotoLoader(
                paths,
                size,
                self.batch_size,
                workers=self.workers,
                ratio=networks.crop_of(about),
                mean=about.get("mean", IMAGENET_MEAN),
                std=about.get("std", IMAGENET_STD),
                device=device,
                dtype=dtype,
            )
            batches = predict(model, loader, names, self.topk)
            with contextlib.suppress(NothingReadable):  # each file is named below
                for batch in _shown(batches, len(paths), self.batch_size):
                    predictions += batch
                    if not self.json:
                        print("\n".join(map(_text, batch)), flush=True)
            failed += loader.unreadable
        if self.json:
            print(json.dumps(_document(how, self.weights, predictions, failed), indent=2))
        for bad in failed:
            print(f"deit: cannot read {bad.path}: {bad.reason}", file=sys.stderr)
        return 1 if failed else 0

    def _written(self, out: Path) -> int:
        """Predictions into a folder of Parquet."""
        from deit.batch import Model

        if self.json or self.classes is not None:
            raise ValueError(
                "--json, --classes: Parquet has the classes' ids; they go without --out"
            )
        model = Model(
            required("weights", self.weights),
            self.arch,
            "probabilities",
            self.dtype,
            self.device,
            self.threads,
            img_size=self.img_size,
            test_head=self.test_head,
            batch_size=self.batch_size,
            decode=self.decode,
            fused=self.fuse,
        )
        return written(
            model, self.images, self.list, out, rows=self.rows, workers=self.workers, topk=self.topk
        )

    def _load(self) -> tuple[DeiT, dict[str, Any]]:
        """The network, and how a run here prepared its images; see `networks.opened`."""
        from deit.weights import networks
        from deit.weights.checkpoint import OFFICIAL_FILES

        if self.weights is None:
            files = ", ".join(OFFICIAL_FILES.values())
            raise ValueError(
                "--weights: expected a file, for random weights predict nothing. The official "
                f"ones, published at github.com/facebookresearch/deit, are {files}"
            )
        return networks.opened_deit(
            self.weights, self.img_size, arch=self.arch, test_head=self.test_head
        )


def _find(given: Sequence[Path]) -> tuple[list[Path], list[Unreadable]]:
    """The images to read; a path that is not there is a failure beside the others."""
    from deit.data.images import Unreadable, find_images

    there = [path for path in given if path.exists()]
    absent = [Unreadable(path, "no such file or folder") for path in given if path not in there]
    return find_images(there) if there or not absent else [], absent


def _shown(
    batches: Iterable[list[Prediction]], total: int, batch_size: int
) -> Iterator[list[Prediction]]:
    """`batches`, with a progress bar where someone watches and there is more than one to come."""
    if total <= batch_size or not sys.stderr.isatty():
        yield from batches
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    # rich would send stdout to its own console, stderr. It may where both are the terminal.
    redirect = sys.stdout.isatty()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=redirect) as bar:
        task = bar.add_task("photographs", total=total)
        for batch in batches:
            yield batch
            bar.advance(task, len(batch))


def _text(prediction: Prediction) -> str:
    lines = [str(prediction.path)]
    for rank, guess in enumerate(prediction.top, start=1):
        lines.append(f"  {rank}  {100 * guess.probability:6.2f} %  {guess.name}")
    return "\n".join(lines)


def _document(
    how: str, weights: Path | None, predictions: list[Prediction], failed: list[Unreadable]
) -> dict[str, object]:
    return {
        "network": how,
        "weights": str(weights),
        "predictions": [
            {"path": str(p.path), "top": [asdict(guess) for guess in p.top]} for p in predictions
        ],
        "unreadable": [{"path": str(bad.path), "reason": bad.reason} for bad in failed],
    }
