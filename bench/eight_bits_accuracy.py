"""What 8-bit products cost a DeiT: top-1, agreement, noise of every operator.

    deit train --data fashion-mnist --recipe fashion-mnist --img-size 28 --arch deit_ti \\
        --embed-dim 96 --depth 4 --num-heads 3 --patch-size 4 --out runs/student
    python bench/eight_bits_accuracy.py runs/student/average.safetensors --data fashion-mnist
    python bench/eight_bits_accuracy.py --arch deit_b --dtype fp8

A trained network classifies held-out images, a variant with fresh weights photographs, in fp32 and
with `fuse(model, dtype=...)`. fp8 runs by its reference on a CPU and by its kernels on a GPU.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import deit
import evidence
from deit.commands import flags
from deit.data.augment import evaluation_transform
from deit.data.loader import Loader, in_order
from deit.data.sources import open_source
from deit.fused_vit import eight_bits, fuse, unfuse
from deit.kernels import attention, gelu_mlp, layer_norm, linear
from deit.model import Block, DeiT
from deit.weights import networks
from evidence import devices
from peers import calibration

# Points of top-1 that a trained network may move by, and the least percentage that agrees.
POINTS, AGREEMENT = 0.3, 99.0
PHOTOGRAPHS = 256


@dataclass(frozen=True)
class Options:
    """Compare a DeiT's products in 8 bits with its fp32."""

    run: flags.Positional[Path | None] = None
    """A folder that `deit train` filled, or a weights' file in it."""
    data: str | None = None
    """The images it is judged by, as `deit eval` takes it."""
    arch: str | None = None
    """In place of a run: a variant with fresh weights, on photographs."""
    dtype: Literal["int8", "fp8"] = "int8"
    """Which 8 bits."""
    device: str = "cpu"
    """int8 runs on a CPU alone."""
    limit: int | None = None
    """Compare on this many images."""
    json: Path | None = None
    """Where to write the result."""


def sqnr(out: Tensor, exact: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB: 20 log10(|exact| / |out - exact|)."""
    return 20 * math.log10(float(exact.norm() / (out.double() - exact).norm()))


def implementation(dtype: str, device: torch.device) -> str:
    """What `fuse` is told to run: fp8's kernels where they can run, int8's best."""
    if dtype == "int8":
        return "auto"
    return "triton" if device.type == "cuda" else "reference"


def block_noise(block: Block, x: Tensor, dtype: str) -> tuple[dict[str, float], Tensor]:
    """SQNR of a block's operators, each on the fp32 model's own input, and the block's output.

    qkv is LN -> product, mlp is LN -> product -> GELU -> product; proj has no norm. Against the
    same operator in fp64; residuals are left out, they would only add signal.
    """
    norm1, norm2 = ((n.weight, n.bias, n.eps) for n in (block.norm1, block.norm2))
    attn, mlp = block.attn, block.mlp
    qkv_weights, proj_weights = ((p.weight, p.bias) for p in (attn.qkv, attn.proj))
    mlp_weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    wide = lambda tensors: tuple(t.double() if isinstance(t, Tensor) else t for t in tensors)
    normed = lambda t, norm: layer_norm(t.double(), *wide(norm))
    kind, impl = eight_bits.KINDS[dtype], implementation(dtype, x.device)

    exact = linear(normed(x, norm1), *wide(qkv_weights))
    noise = {"qkv": sqnr(kind.linear(x, *qkv_weights, norm=norm1, impl=impl), exact)}
    mixed = attention(exact.float(), attn.num_heads)
    exact = linear(mixed.double(), *wide(proj_weights))
    noise["proj"] = sqnr(kind.linear(mixed, *proj_weights, impl=impl), exact)
    x = x + exact.float()
    exact = gelu_mlp(normed(x, norm2), *wide(mlp_weights))
    noise["mlp"] = sqnr(kind.mlp(x, *mlp_weights, norm=norm2, impl=impl), exact)
    return noise, x + exact.float()


def operator_noise(model: DeiT, images: Tensor, dtype: str) -> dict[str, list[float]]:
    """SQNR in dB of every operator, a list over the blocks."""
    found: dict[str, list[float]] = {"qkv": [], "proj": [], "mlp": []}
    x = model.embed(images)
    for block in model.blocks:
        noise, x = block_noise(block, x, dtype)
        for name, decibels in noise.items():
            found[name].append(round(decibels, 2))
    return found


def logits(model: DeiT, images: Tensor) -> Tensor:
    """Logits of all images, so many at a time that a CPU's memory holds them."""
    at_once = 500 if images.shape[-1] < 64 else 16
    return torch.cat([model(part) for part in images.split(at_once)])


@torch.inference_mode()
def compare(
    model: DeiT, images: Tensor, labels: Tensor | None, dtype: str = "int8"
) -> dict[str, Any]:
    """fp32 against 8 bits on images, labelled or not; the model is left as it was."""
    plain = logits(model, images)
    noise = operator_noise(model, images[: 256 if images.shape[-1] < 64 else 8], dtype)
    fuse(model, implementation(dtype, images.device), dtype=dtype)
    quantised = logits(model, images)
    unfuse(model)
    agreement = 100 * float((plain.argmax(1) == quantised.argmax(1)).float().mean())
    found: dict[str, Any] = {"images": len(images)}
    if labels is not None:
        for name, out in (("fp32", plain), (dtype, quantised)):
            right = 100 * float((out.argmax(1) == labels).float().mean())
            found[f"top1_{name}"] = round(right, 2)
    # The mean logits are most of a network's logits, and say nothing of any one image.
    apart, exact = (out.double() - out.double().mean(0) for out in (quantised, plain))
    return {
        **found,
        "agreement": round(agreement, 2),
        "logits_sqnr_db": round(sqnr(quantised, plain.double()), 2),
        "logits_apart_sqnr_db": round(sqnr(apart, exact), 2),
        "operator_sqnr_db": noise,
    }


def held_out(options: Options, about: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The images that the network is judged by, as `deit eval` shows them, and their labels."""
    assert options.data is not None  # main has asked for it
    source = open_source(options.data, "val", limit=options.limit)
    size, crop = about["network"]["img_size"], about["options"]["recipe"]["eval_crop"]
    transform = evaluation_transform(size, crop, tuple(about["mean"]), tuple(about["std"]))
    order = in_order(len(source), 500)
    loader = Loader(source, transform, order, seed=0, workers=0, device=torch.device("cpu"))
    batches = list(loader)
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def subject(options: Options) -> tuple[DeiT, str, Tensor, Tensor | None]:
    """The network, what it is in words, its images and their labels where they have some."""
    if options.run is None:
        if options.arch is None or options.data is not None:
            raise SystemExit("expected a run and its --data, or --arch alone")
        torch.manual_seed(0)
        fresh = deit.create(options.arch).eval()
        images, what = calibration.photographs(fresh.config.img_size, options.limit or PHOTOGRAPHS)
        return fresh, f"{options.arch} with fresh weights, {what}", images, None
    if options.data is None or options.arch is not None:
        raise SystemExit("expected --data, and no --arch, beside a run")
    model, about = networks.restore(options.run)
    if not isinstance(model, DeiT):
        raise SystemExit(f"run: expected a DeiT of this package; got {about['network']['arch']}")
    shape = f"DeiT of {model.config.depth} blocks of {model.config.embed_dim} channels"
    epochs = about["options"]["recipe"]["epochs"]
    return model, f"{shape}, {options.data}, {epochs} epochs", *held_out(options, about)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0; 1 beyond 0.3 points of top-1 or below 99 % agreement."""
    options = flags.parse(Options, arguments, __doc__)
    device = torch.device(options.device)
    if options.dtype == "int8" and device.type != "cpu":
        raise SystemExit(f"device: int8 runs on a CPU; got {device}")
    model, what, images, labels = subject(options)
    labels = None if labels is None else labels.to(device)
    result = compare(model.to(device), images.to(device), labels, options.dtype)
    row = {
        "date": evidence.now(),
        "command": evidence.command_line(arguments, "eight_bits_accuracy.py"),
        **evidence.kernels(device.type, **{options.dtype: True}),
        **devices.describe(device),
        "model": what,
        "dtype": options.dtype,
        "impl": implementation(options.dtype, device),
        **result,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        evidence.save(options.json, row)
    if labels is None:
        return 0
    change = abs(result["top1_fp32"] - result[f"top1_{options.dtype}"])
    return 0 if change <= POINTS and result["agreement"] >= AGREEMENT else 1


if __name__ == "__main__":
    sys.exit(main())
