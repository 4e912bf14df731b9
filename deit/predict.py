"""`deit predict`: the likeliest classes of photographs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deit import devices
from deit.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NothingReadable,
    PhotoLoader,
    Unreadable,
    find_images,
)
from deit.data.limits import not_regular
from deit.model import DeiT
from deit.weights import networks
from deit.weights.checkpoint import OFFICIAL_FILES

if TYPE_CHECKING:
    from deit.commands.cli import Predict


CLASSES_BYTES = 64 << 20  # of a file of class names


@dataclass(frozen=True)
class Guess:
    """One class: its index, its name (the index again where names are unknown), probability."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one photograph, the likeliest first."""

    path: Path
    top: list[Guess]


def class_names(num_classes: int, file: Path | None = None) -> list[str]:
    """A name for every class: from `file`, ImageNet's (as timm has them) for 1000, else indices.

    Raises ValueError if the file is not text, or has not one name for every class.
    """
    if file is not None:
        names = _lines(file)
        if len(names) != num_classes:
            raise ValueError(
                f"classes: expected {num_classes} lines, one for each class of the network; "
                f"{file} has {len(names)}"
            )
        return names
    if num_classes != 1000:
        return [f"class {index}" for index in range(num_classes)]
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_descriptions()


def _lines(file: Path) -> list[str]:
    """Lines of UTF-8 text, with a byte order mark or without; they end in LF, CR LF or CR alone.

    str.splitlines would end them at form feeds and U+2028 as well, which names may hold.
    """
    what = not_regular(file)
    if what is not None:
        raise ValueError(f"classes: expected a regular file; got {what}, {file}")
    if (size := file.stat().st_size) > CLASSES_BYTES:
        raise ValueError(f"classes: expected at most {CLASSES_BYTES} bytes; {file} has {size}")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"classes: {file} is not UTF-8 text ({error.reason})") from None
    return lines[:-1] if lines[-1] == "" else lines


def predict(
    model: DeiT, loader: PhotoLoader, names: Sequence[str], topk: int = 5
) -> Iterator[list[Prediction]]:
    """A list of predictions for each batch of `loader`, on the model's device and dtype.

    Probabilities are the softmax, in fp32, of what the model returns in evaluation mode; see
    `DeiT` for its `test_head`. Images that cannot be read are left to `loader.unreadable`.
    Raises ValueError if `topk` is not in 1..classes, or an output is not finite.
    """
    if not 1 <= topk <= model.config.num_classes:
        raise ValueError(
            f"topk: expected 1 to {model.config.num_classes}, the network's classes; got {topk}"
        )
    model.eval()
    for images, paths in loader:
        with torch.inference_mode():
            probabilities = model(images).float().softmax(dim=-1)
            values, indices = (t.tolist() for t in probabilities.topk(topk))
        found = []
        for path, row, places in zip(paths, values, indices, strict=True):
            if row[0] != row[0]:
                raise ValueError(
                    f"{path}: the network's output is not finite in {images.dtype} "
                    "(fp16 overflows where fp32 and bf16 do not)"
                )
            guesses = zip(places, row, strict=True)
            found.append(Prediction(path, [Guess(i, names[i], p) for i, p in guesses]))
        yield found


def run(options: Predict) -> int:
    """The command: predictions to stdout, all else to stderr.

    Returns 0, or 1 if an image could not be read. Raises ValueError for bad input.
    """
    paths, failed = _find(options.images)
    device = devices.named(options.device)
    loaded, about = _load(options)
    model = loaded.to(device, devices.DTYPES[options.dtype])
    names = about.get("classes")
    if names is None or options.classes is not None:
        names = class_names(model.config.num_classes, options.classes)
    if options.fuse:
        from deit.fused_vit import fuse

        fuse(model)
    size = model.config.img_size
    how = f"{model.config.label} at {size} px, {options.dtype} on {device}"
    how += ", fused" if options.fuse else ", not fused"
    print(f"deit: {how}; {len(paths)} image{'s' * (len(paths) != 1)}", file=sys.stderr)
    predictions: list[Prediction] = []
    if paths:
        loader = PhotoLoader(
            paths,
            size,
            options.batch_size,
            ratio=networks.crop_of(about),
            mean=about.get("mean", IMAGENET_MEAN),
            std=about.get("std", IMAGENET_STD),
            device=device,
            dtype=devices.DTYPES[options.dtype],
        )
        batches = predict(model, loader, names, options.topk)
        with contextlib.suppress(NothingReadable):  # each file is named below
            for batch in _shown(batches, len(paths), options.batch_size):
                predictions += batch
                if not options.json:
                    print("\n".join(map(_text, batch)), flush=True)
        failed += loader.unreadable
    if options.json:
        print(json.dumps(_document(how, options.weights, predictions, failed), indent=2))
    for bad in failed:
        print(f"deit: cannot read {bad.path}: {bad.reason}", file=sys.stderr)
    return 1 if failed else 0


def _load(options: Predict) -> tuple[DeiT, dict[str, Any]]:
    """The network, and how a run here prepared its images; see `networks.opened`."""
    if options.weights is None:
        files = ", ".join(OFFICIAL_FILES.values())
        raise ValueError(
            "--weights: expected a file, for random weights predict nothing. The official ones, "
            f"published at github.com/facebookresearch/deit, are {files}"
        )
    model, about = networks.opened(
        options.weights, options.img_size, arch=options.arch, test_head=options.test_head
    )
    if not isinstance(model, DeiT):
        raise ValueError(f"weights: expected a DeiT; got a {type(model).__name__}")
    return model, about


def _find(given: Sequence[Path]) -> tuple[list[Path], list[Unreadable]]:
    """The images to read; a path that is not there is a failure beside the others."""
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
    # rich would send stdout to its own console, stderr; only where both are the terminal may it.
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
