"""A network that takes images as they come and returns numpy: `Model`."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deit import devices
from deit.batch.images import Decode, Reader
from deit.configs import Config
from deit.data.decoding import UnreadableImage
from deit.data.images import IMAGENET_MEAN, IMAGENET_STD, normalise
from deit.fused_vit import compile_graph, eight_bits, fuse
from deit.model import TEST_HEADS
from deit.weights import networks

OUTPUTS = ("logits", "probabilities", "embedding")


class Rows(NamedTuple):
    """What a batch of images gave."""

    values: np.ndarray  # [n, width], fp32; NaN where there is an error
    errors: list[str | None]  # why an image has no values


class Model:
    """A DeiT with its weights, its preparation of images and its device: images in, numpy out.

        model = Model("deit_small_patch16_224-cd65a155.pth", output="probabilities")
        model([open("a.jpg", "rb").read(), "b.png", array])     # [3, 1000]

    It holds one copy of the weights, and nothing outside itself but, where `threads` is given,
    torch's number of threads in this process. Pickled, it is its arguments: another process
    (forked, spawned, on another machine that finds the weights under the same path) loads the
    weights at its first call. It may be called from several threads; they take turns.
    """

    def __init__(
        self,
        weights: str | Path,
        arch: str | None = None,
        output: Literal["logits", "probabilities", "embedding"] = "logits",
        dtype: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32",
        device: str = "auto",
        threads: int | None = None,
        *,
        img_size: int | None = None,
        test_head: str | None = None,
        batch_size: int = 32,
        decode: Decode = "exact",
        fused: bool = True,
    ) -> None:
        """Load, fuse and warm the network.

        Args:
            weights: a run's folder, or anything that `deit.load` takes as a path.
            arch: the network's name, where the weights do not say it.
            output: "logits", [n, classes]; "probabilities", their softmax in fp32; "embedding",
                [n, width of the network]: the normalised class token, which the classifier reads,
                and of a distilled network the mean of its two tokens (timm's `pre_logits`).
            dtype: what the network computes in; "int8" and "fp8" as `fuse` has them.
            device: a torch device; "auto" is the first GPU, or the CPU where there is none.
            threads: torch's threads in this process, and those that decode in a call. None leaves
                torch's as they are.
            img_size: pixels along a side; None for the weights' own.
            test_head: of a distilled network; None for "softmax-sum", of embeddings for the mean.
                "class" and "distillation" choose one head, or one token.
            batch_size: the most images of one forward. On a GPU the batches of 1, 2, 4, ... up to
                it are each one CUDA graph, and others are filled up to the next. On a CPU a batch
                is computed as it is, and a first image is run here.
            decode: "exact" prepares images as evaluation does; see `deit.batch.images`.
            fused: run on the fused operators.

        Raises:
            ValueError: an argument outside its range, no DeiT, weights that do not fit, a device
                that is not here. TypeError: a number that is none. OSError: no weights there.
        """
        for name, number in (("batch_size", batch_size), ("threads", threads)):
            if number is None and name == "threads":
                continue
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name}: expected a whole number; got {number!r}")
            if number < 1:
                raise ValueError(f"{name}: expected at least 1; got {number}")
        if output not in OUTPUTS:
            raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}; got {output!r}")
        kinds = (*devices.DTYPES, *eight_bits.KINDS)
        if dtype not in kinds:
            raise ValueError(f"dtype: expected one of {', '.join(kinds)}; got {dtype!r}")
        if test_head is None:
            test_head = "logit-mean" if output == "embedding" else "softmax-sum"
        if test_head not in TEST_HEADS:
            raise ValueError(f"test_head: expected one of {TEST_HEADS}; got {test_head!r}")
        if output == "embedding" and test_head == "softmax-sum":
            raise ValueError("test_head: tokens have no softmax; expected another head than that")
        self.weights = str(Path(weights).absolute())  # another process may stand elsewhere
        self.arch, self.img_size, self.test_head = arch, img_size, test_head
        self.output, self.dtype, self.device_name = output, dtype, device
        self.threads, self.batch_size, self.decode = threads, batch_size, decode
        self.fused = fused
        self._start()
        _ = self._loaded

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._network: _Network | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    @property
    def _loaded(self) -> _Network:
        with self._lock:
            if self._network is None:
                self._network = _Network(self)
            return self._network

    # ---- what it is

    @property
    def config(self) -> Config:
        """The network's."""
        return self._loaded.config

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._loaded.device

    @property
    def width(self) -> int:
        """Numbers in a row: classes, or the embedding's width."""
        return self.config.embed_dim if self.output == "embedding" else self.config.num_classes

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, where the weights have them."""
        return self._loaded.classes

    @property
    def reader(self) -> Reader:
        """What prepares its images; picklable, so that other processes can decode for it."""
        return self._loaded.reader

    def about(self) -> dict[str, Any]:
        """Everything that its numbers depend on, as JSON: the weights by their hash."""
        network = self._loaded
        return {
            "network": network.config.label,
            "weights": network.digest,
            "output": self.output,
            "test_head": self.test_head,
            "dtype": self.dtype,
            "device": network.device.type,
            # They split the sums of products: fp32 by one and by two differs in the last bits.
            "threads": torch.get_num_threads() if network.device.type == "cpu" else None,
            "fused": self.fused,
            "img_size": network.config.img_size,
            "short_side": network.reader.prepare.short_side,
            "mean": list(network.mean),
            "std": list(network.std),
            "decode": self.decode,
        }

    # ---- calls

    def __call__(self, images: Sequence[Any] | np.ndarray) -> np.ndarray:
        """[n, width] fp32 of n images: encoded bytes, paths, uint8 arrays [height, width, 3].

        Raises:
            UnreadableImage: one cannot be read; it is named by its place, or its path.
            ValueError: an output is not finite. TypeError: no sequence, or no image in it.
        """
        values, errors = self.read(images)
        for place, error in enumerate(errors):
            if error is not None:
                image = images[place]
                raise UnreadableImage(
                    image if isinstance(image, (str, Path)) else f"images[{place}]", error
                )
        return values

    def read(self, images: Sequence[Any] | np.ndarray) -> Rows:
        """The same, with an image that cannot be read as a row of NaN and its reason.

        So one bad file does not cost a scheduler's task. Raises TypeError as a call does.
        """
        _check_sequence(images)
        values = np.full((len(images), self.width), np.nan, np.float32)
        errors: list[str | None] = [None] * len(images)
        for start, pixels, reasons in self._decoded(images):
            good = [start + i for i, reason in enumerate(reasons) if reason is None]
            for i, reason in enumerate(reasons):
                errors[start + i] = reason
            if not good:
                continue
            values[good] = self.compute(torch.stack(pixels)).cpu().numpy()
            for place in good:
                if not np.isfinite(values[place]).all():
                    values[place], errors[place] = np.nan, self.not_finite
        return Rows(values, errors)

    @property
    def not_finite(self) -> str:
        """The reason of a row whose output overflowed."""
        return (
            f"the network's output is not finite in {self.dtype} "
            "(fp16 overflows where fp32 and bf16 do not)"
        )

    def _decoded(
        self, images: Sequence[Any] | np.ndarray
    ) -> Iterator[tuple[int, list[Tensor], list[str | None]]]:
        """Pixels by batches; the next batch is decoded while the network has this one."""
        reader = self.reader

        def decode(place: int) -> Tensor | str:
            try:
                return reader(images[place], f"images[{place}]")
            except UnreadableImage as error:
                return error.reason

        starts = range(0, len(images), self.batch_size)
        workers = self.threads or torch.get_num_threads()
        with ThreadPoolExecutor(workers, "deit-decode") as pool:

            def submit(start: int) -> list[Future[Tensor | str]]:
                places = range(start, min(start + self.batch_size, len(images)))
                return [pool.submit(decode, place) for place in places]

            ahead = submit(0)
            for start in starts:
                found = [future.result() for future in ahead]
                ahead = submit(start + self.batch_size)
                yield (
                    start,
                    [each for each in found if isinstance(each, Tensor)],
                    [each if isinstance(each, str) else None for each in found],
                )

    def compute(self, pixels: Tensor) -> Tensor:
        """[n, 3, size, size] uint8, n up to `batch_size` -> [n, width] fp32 on the device.

        On a GPU it returns before the device is done. Raises ValueError for another shape.
        """
        network = self._loaded
        size = network.config.img_size
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixels: expected shape [n, 3, {size}, {size}]; got {list(pixels.shape)}"
            )
        if not 1 <= len(pixels) <= self.batch_size:
            raise ValueError(f"pixels: expected 1 to {self.batch_size} images; got {len(pixels)}")
        with self._lock:
            return network(pixels)


def _check_sequence(images: Any) -> None:
    one = isinstance(images, (str, bytes, bytearray, memoryview, Path))
    if one or not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise TypeError(
            f"images: expected a sequence of images (bytes, paths, arrays); "
            f"got {type(images).__name__}"
        )


class _Network:
    """What a process has of a Model once it is loaded."""

    def __init__(self, model: Model) -> None:
        if model.threads is not None:
            torch.set_num_threads(model.threads)
        self.device = devices.named(model.device_name)
        network, about = networks.opened_deit(
            Path(model.weights), model.img_size, arch=model.arch, test_head=model.test_head
        )
        self.config = network.config
        self.classes: list[str] | None = about.get("classes")
        self.mean = tuple(about.get("mean", IMAGENET_MEAN))
        self.std = tuple(about.get("std", IMAGENET_STD))
        self.reader = Reader(self.config.img_size, networks.crop_of(about), model.decode)
        self.digest = _digest(network)
        self.probabilities = model.output == "probabilities"
        if model.output == "embedding":  # so that the last block still runs for the tokens alone
            network.head = nn.Identity()  # type: ignore[assignment]
            if self.config.distilled:
                network.head_dist = nn.Identity()  # type: ignore[assignment]
        bits = model.dtype if model.dtype in eight_bits.KINDS else None
        self.dtype = torch.float32 if bits else devices.DTYPES[model.dtype]
        self.network = network.to(self.device, self.dtype).eval().requires_grad_(False)
        if model.fused:
            fuse(self.network, dtype=bits)
        elif bits:
            raise ValueError(f"dtype: {bits} is of the fused operators; got fused=False")
        self.graphs: dict[int, Any] = {}
        self._warm(model.batch_size)

    def _warm(self, batch_size: int) -> None:
        size = self.config.img_size
        if self.device.type != "cuda":
            self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
            return
        sizes = [1 << k for k in range(batch_size.bit_length()) if 1 << k < batch_size]
        for n in (*sizes, batch_size):
            batch = torch.zeros(n, 3, size, size, dtype=self.dtype, device=self.device)
            self.graphs[n] = compile_graph(self.network, batch)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        n = len(pixels)
        images = pixels.to(self.device, non_blocking=True)
        images = normalise(images, self.dtype, self.mean, self.std)
        if self.graphs:
            bucket = next(size for size in self.graphs if size >= n)
            if bucket > n:
                images = torch.cat([images, images.new_zeros(bucket - n, *images.shape[1:])])
            found = self.graphs[bucket](images)[:n]
        else:
            found = self.network(images)
        found = found.float()
        return found.softmax(dim=-1) if self.probabilities else found


def _digest(network: nn.Module) -> str:
    """Of all weights by name: the same for a state dict in whatever file it lay."""
    sums = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        sums.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        sums.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return sums.hexdigest()
