"""What a training image costs before the network sees it, by the workers and on the device.

    python bench/loader.py --json bench/results/loader.json
    python bench/loader.py --data imagenet --bs 256

One worker's images/s where it augments whole samples, and where it crops and draws only
(`deit train --augment-on device`); the device's images/s for what is then left to it, copy
included. Ways are interleaved in rounds and each sees the same images, draws and batches.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

import evidence
from deit.commands import flags
from deit.commands.train import RecipeName
from deit.data.augment import training_transform
from deit.data.drawn import split
from deit.data.loader import Batch, Loader
from deit.data.sampling import Draw
from deit.data.sources import Source, open_source
from deit.recipes import RECIPES
from evidence import devices, timing
from peers import calibration

CPU = torch.device("cpu")
DECODE, WHOLE, DRAWN, DEVICE = "decoding alone", "a worker, whole", "a worker, crop", "the device"


@dataclass(frozen=True)
class Options:
    """Measure what reading and augmenting an image cost a worker and the device."""

    data: str | None = None
    """As `deit train` takes it; left out: photographs of 500 x 375 pixels, as JPEG."""
    recipe: RecipeName = "deit"
    """Whose augmentation."""
    img_size: int = 224
    """Pixels along a side."""
    bs: int = 64
    """Images in a batch."""
    rounds: int = 12
    """How often each way is timed."""
    device: str = "auto"
    """Where batches are augmented."""
    json: Path | None = None
    """Where to write the result."""


def photographs(folder: Path) -> None:
    """Those of scikit-image and scikit-learn below `folder`, at the usual size of ImageNet's."""
    inside = folder / "train" / "photograph"
    inside.mkdir(parents=True)
    for number, array in enumerate(calibration.shipped()):
        image = ImageOps.fit(Image.fromarray(array), (500, 375))
        image.save(inside / f"{number}.jpg", quality=90)


def measure(options: Options, source: Source, device: torch.device) -> dict[str, Any]:
    """Images/s of every way, the bytes of a batch, and how many times faster a worker is."""
    how = (RECIPES[options.recipe], options.img_size, source.mean, source.std)
    drawing, augmentation = split(*how, device)
    transforms: dict[str, Any] = {
        DECODE: lambda image: torch.empty(0),
        WHOLE: training_transform(*how),
        DRAWN: drawing,
    }
    batches: dict[str, Batch] = {}
    clock = timing.Clock(device)

    def load(way: str, turn: int) -> float:
        draws = [Draw(turn, p, turn, p % len(source), 0) for p in range(options.bs)]
        reader = Loader(source, transforms[way], [draws], seed=0, workers=0, device=CPU)
        (batches[way],) = reader
        return batches[way].seconds

    def augment(turn: int) -> float:
        crops = Batch.pin_memory(batches[DRAWN]) if device.type == "cuda" else batches[DRAWN]
        return clock.time(lambda: augmentation(crops.to(device).images, crops.drawn))

    def prepare(turn: int) -> None:  # what `augment` takes, and overwrites
        load(DRAWN, turn)

    steps = [*(lambda turn, way=way: load(way, turn) for way in transforms), augment]
    prepare(0)
    for step in steps:
        step(0)  # the first calls import, allocate and choose
    seconds = timing.interleave(steps, options.rounds, before=prepare)
    samples = dict(zip((*transforms, DEVICE), seconds, strict=True))
    speeds = {way: timing.spread([options.bs / s for s in each]) for way, each in samples.items()}
    gain = timing.compare(samples[DRAWN], samples[WHOLE])
    return {
        "batch": options.bs,
        "img_size": options.img_size,
        "recipe": options.recipe,
        "n": options.rounds,
        "bytes_workers": batches[WHOLE].images.nbytes,
        "bytes_device": batches[DRAWN].images.nbytes,
        "worker_gain": round(gain.ratio, 3),
        "worker_gain_interval": None if gain.low is None else [gain.low, gain.high],
        "rows": [
            {"way": way, "img_per_s": s.median, "img_per_s_low": s.low, "img_per_s_high": s.high}
            for way, s in speeds.items()
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0; 2 for bad options or data."""
    options = flags.parse(Options, arguments, __doc__)
    with ExitStack() as stack:
        try:
            device = devices.resolve(options.device)
            folder = options.data
            if folder is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                photographs(Path(folder))
            found = measure(options, open_source(folder, "train"), device)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for row in found["rows"]:
        low, high = row["img_per_s_low"], row["img_per_s_high"]
        print(f"{row['way']:>16}: {row['img_per_s']:7.0f} images/s ({low:.0f} to {high:.0f})")
    sizes = (found["bytes_workers"] / 1e6, found["bytes_device"] / 1e6)
    print(f"a batch from a worker: {sizes[0]:.1f} MB, or {sizes[1]:.1f} MB of crops")
    print(f"a worker that only crops is {found['worker_gain']:.2f} times as fast")
    if options.json:
        about = {
            "kind": "loader",
            "title": "Reading and augmenting images",
            "date": evidence.now(),
            "command": evidence.command_line(arguments, "loader.py"),
            **devices.describe(device),
        }
        evidence.save(options.json, about | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
