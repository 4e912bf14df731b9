"""What a collection costs: decoding by itself, the network by itself, and both together.

    python bench/batch.py --archs deit_ti deit_s
    python bench/batch.py --archs none                  # decoding alone

Photographs of 500 x 375 pixels and of 12 megapixels, as JPEG. Decoding is timed by one core's CPU
time, way by way, with what each does to the pixels. Then `deit.batch.run` goes over a collection:
images/s of its decoder with no network, of the network with no decoder, and of both. On a CPU both
use the same cores, so no order of work is faster than 1 / (1 / decoder + 1 / network): the
"bound". A second row has in the network's place a device that needs as long and none of the cores,
as a GPU would; there the bound is the smaller of the two.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

import deit
import evidence
from deit.batch import Inputs, Model, run
from deit.batch.decoding import Plan, cores, decoded
from deit.batch.images import Decode, Reader
from deit.batch.pieces import Pieces
from deit.commands import flags
from deit.data.decoding import keep_memory, load_image
from deit.data.images import normalise
from deit.weights.checkpoint import save
from evidence import devices, timing
from peers import calibration

Size = Literal["500x375", "12mp"]
SIZES: dict[Size, tuple[int, int]] = {"500x375": (500, 375), "12mp": (4000, 3000)}


@dataclass(frozen=True)
class Options:
    """Measure decoding, the network, and both together."""

    archs: tuple[str, ...] = ("deit_ti", "deit_s")
    """Networks of random weights; none: decoding alone."""
    dtype: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32"
    """What the network computes in."""
    device: str = "auto"
    """Where the network runs."""
    sizes: tuple[Size, ...] = ("500x375", "12mp")
    """Of the photographs, in pixels."""
    batch_size: int = 16
    """Images at a time."""
    seconds: float = 10.0
    """Of one pass over a collection, about; at least eight batches."""
    rounds: int = 6
    """Interleaved rounds of everything."""
    workers: tuple[int, ...] = ()
    """Numbers of decoding processes to try; left out: one a core."""
    decode: Decode = "exact"
    """How a collection is decoded: exact, fast or scaled."""
    json: Path | None = None
    """Where to write the result."""


def photographs(size: tuple[int, int]) -> list[bytes]:
    """Those of scikit-image and scikit-learn, resized, at quality 90."""
    found = []
    for array in calibration.shipped():
        file = io.BytesIO()
        ImageOps.fit(Image.fromarray(array), size).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


# ---- decoding by itself


def ways() -> dict[str, Callable[[bytes], Any]]:
    """From an encoded image to the network's pixels, and parts of the way."""
    exact, fast, scaled = (Reader(224, None, how) for how in ("exact", "fast", "scaled"))
    images = torch.zeros(32, 3, 224, 224, dtype=torch.uint8)
    pillow = lru_cache(load_image)  # what is resized alone is decoded once
    tensor = lru_cache(lambda data: pil_to_tensor(load_image(data)))

    found: dict[str, Callable[[bytes], Any]] = {
        "decode alone, Pillow": load_image,
        "decode alone, torchvision": by_torchvision,
        "resize alone, Pillow": lambda data: exact.prepare(pillow(data)),
        "resize alone, PyTorch": lambda data: fast.prepare(tensor(data)),
        "normalise alone (of 32)": lambda data: normalise(images),
        BEFORE: exact,
        "exact": exact,
        "fast": fast,
        "fast, torchvision's decoder": lambda data: fast.prepare(by_torchvision(data)),
        "scaled": scaled,
    }
    try:
        import simplejpeg
    except ImportError:
        return found
    found["decode alone, simplejpeg"] = lambda data: simplejpeg.decode_jpeg(
        data, fastdct=False, fastupsample=False
    )
    return found


def by_torchvision(data: bytes) -> Tensor:
    """[3, height, width] uint8."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


BEFORE = "exact, memory not kept"


def decoding(data: list[bytes], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one core for each way, and how far its pixels are from "exact"."""
    steps = ways()
    repeats = max(1, 140 // len(data)) if len(data[0]) < 200_000 else 1

    def timed(name: str, step: Callable[[bytes], Any]) -> float:
        keep_memory(0 if name == BEFORE else 256 << 20)
        for each in data if "resize" in name else data[:1]:
            step(each)
        start = time.process_time()
        for _ in range(repeats):
            for each in data:
                step(each)
        return 1e3 * (time.process_time() - start) / (repeats * len(data))

    torch.set_num_threads(1)
    turns = [lambda turn, n=name, s=step: timed(n, s) for name, step in steps.items()]
    samples = timing.interleave(turns, rounds)
    keep_memory(0)
    wanted = [steps["exact"](each).int() for each in data]
    rows = []
    for (name, step), each in zip(steps.items(), samples, strict=True):
        spread = timing.spread(each)
        row = {"way": name, "ms": spread.median, "low": spread.low, "high": spread.high}
        if "alone" not in name:
            away = torch.stack(
                [(step(d).int() - w).abs() for d, w in zip(data, wanted, strict=True)]
            )
            row |= {
                "most": int(away.max()),
                "mean": float(away.float().mean()),
                "share": float((away > 0).float().mean()),
            }
        rows.append(row)
    return rows


# ---- together


class Device(Model):
    """In the network's place: as long for a batch, and none of the cores."""

    per_image = 0.0

    def compute(self, pixels: Tensor) -> Tensor:
        time.sleep(self.per_image * len(pixels))
        return torch.zeros(len(pixels), self.width)


def decoder_alone(model: Model, inputs: Inputs, out: Path, workers: int) -> float:
    """Seconds."""
    start = time.perf_counter()
    pieces = Pieces(out, {})
    for _ in decoded(Plan(inputs, pieces, 4096, model.batch_size), model.reader, workers, False):
        pass
    pieces.close()
    return time.perf_counter() - start


def network_alone(model: Model, count: int) -> float:
    """Seconds."""
    images = torch.zeros(model.batch_size, 3, 224, 224, dtype=torch.uint8)
    start = time.perf_counter()
    for first in range(0, count, model.batch_size):
        found = model.compute(images[: min(model.batch_size, count - first)])
    found.cpu()
    return time.perf_counter() - start


def collection(folder: Path, data: list[bytes], count: int) -> Inputs:
    """`count` files."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(data[number % len(data)])
    return Inputs([folder])


def together(
    model: Model, data: list[bytes], options: Options, workers: int, folder: Path, name: str
) -> list[dict[str, Any]]:
    """Images/s of the parts and of the whole, by the medians of paired rounds."""
    per_image = timing.Clock(torch.device("cpu")).time(lambda: model.reader(data[0]), 3)
    per_image += network_alone(model, 16) / 16
    count = max(8 * model.batch_size, round(options.seconds / per_image))
    inputs = collection(folder / "photos", data, count)
    stand_in = Device(
        model.weights, output="embedding", batch_size=model.batch_size, decode=options.decode
    )
    turn = iter(range(10**6))
    out = lambda: folder / f"out{next(turn)}"

    def whole(which: Model) -> float:
        return run(which, inputs, out(), workers=workers).seconds

    def network(_: int) -> float:
        seconds = network_alone(model, count)
        stand_in.per_image = seconds / count
        return seconds

    network(0)
    samples = timing.interleave(
        [
            lambda _: decoder_alone(model, inputs, out(), workers),
            network,
            lambda _: whole(model),
            lambda _: whole(stand_in),
        ],
        options.rounds,
    )
    decoder, net, both, beside = ([count / s for s in each] for each in samples)
    shared = model.device.type == "cpu"
    rows = []
    for what, found, bound in (
        (name, both, [1 / (1 / d + 1 / n) if shared else min(d, n)
                      for d, n in zip(decoder, net, strict=True)]),
        (f"{name}, as a device", beside, [min(d, n) for d, n in zip(decoder, net, strict=True)]),
    ):  # fmt: skip
        ratio = timing.compare([1 / f for f in found], [1 / b for b in bound])
        least = timing.compare(
            [1 / f for f in found], [1 / min(d, n) for d, n in zip(decoder, net, strict=True)]
        )
        rows.append({
            "what": what, "workers": workers, "images": count,
            "decoder": timing.spread(decoder).median, "network": timing.spread(net).median,
            "end_to_end": timing.spread(found).median, "of_bound": ratio.ratio,
            "of_bound_interval": [ratio.low, ratio.high], "of_min": least.ratio,
        })  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0; 2 for bad options."""
    options = flags.parse(Options, arguments, __doc__)
    try:
        device = devices.resolve(options.device)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, str(device), Path(folder))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        about = {
            "kind": "batch",
            "title": "Collections: decoding, the network, and both",
            "date": evidence.now(),
            "command": evidence.command_line(arguments, "batch.py"),
            **devices.describe(device),
        }
        evidence.save(options.json, about | found)
    return 0


def measure(options: Options, device: str, folder: Path) -> dict[str, Any]:
    """Prints each part as it is known."""
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]
    print(f"{cores()} cores; the load before was {load:.1f}: taken beside other work if above 0.5")
    found: dict[str, Any] = {"load": load, "decoding": {}, "together": []}
    encoded = {name: photographs(SIZES[name]) for name in options.sizes}
    for name, data in encoded.items():
        print(f"\n{name}, one core, CPU ms an image (quartiles); pixels beside exact's")
        found["decoding"][name] = rows = decoding(data, options.rounds)
        for row in rows:
            line = f"  {row['way']:<30} {row['ms']:8.2f} ({row['low']:.2f} to {row['high']:.2f})"
            if row.get("most"):
                line += f"   {100 * row['share']:.2f} % differ, most {row['most']}, "
                line += f"mean {row['mean']:.3f}"
            print(line, flush=True)
    torch.set_num_threads(threads)
    print("\nimages/s                          workers  decoder  network  both   of bound  of min")
    for arch in options.archs:
        if arch == "none":
            continue
        weights = folder / f"{arch}.safetensors"
        save(deit.create(arch).eval(), weights)
        model = Model(
            weights, None, "embedding", options.dtype, device,
            batch_size=options.batch_size, decode=options.decode,
        )  # fmt: skip
        for name, data in encoded.items():
            for workers in options.workers or (min(cores(), 16),):
                with tempfile.TemporaryDirectory() as inside:
                    label = f"{arch}, {name}"
                    rows = together(model, data, options, workers, Path(inside), label)
                found["together"] += rows
                for row in rows:
                    print(f"  {row['what']:<32}{row['workers']:>7}{row['decoder']:>9.1f}"
                          f"{row['network']:>9.1f}{row['end_to_end']:>7.1f}"
                          f"{100 * row['of_bound']:>9.0f} %{100 * row['of_min']:>6.0f} %",
                          flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
