"""What 8-bit products cost a really trained DeiT: top-1, agreement, noise of every operator.

    deit train --data fashion-mnist --recipe fashion-mnist --img-size 28 --arch deit_ti \\
        --embed-dim 96 --depth 4 --num-heads 3 --patch-size 4 --out runs/student
    python bench/int8_accuracy.py runs/student/average.safetensors --data fashion-mnist

Classifies the held-out images with a trained network in fp32 and with `fuse(model, dtype="int8")`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import devices
import evidence
import torch
import tyro
from torch import Tensor

from deit import networks
from deit.data.augment import evaluation_transform
from deit.data.loader import Loader, in_order
from deit.data.sources import open_source
from deit.fused_vit import fuse, unfuse
from deit.kernels import attention, gelu_mlp, int8_gelu_mlp, int8_linear, layer_norm, linear
from deit.model import Block, DeiT


@dataclass(frozen=True)
class Options:
    """Compare a trained DeiT's int8 with its fp32 on held-out images."""

    run: tyro.conf.Positional[Path]
    """A folder that `deit train` filled, or a weights' file in it."""
    data: str
    """As `deit eval` takes it."""
    limit: int | None = None
    """Compare on this many images."""
    json: Path | None = None
    """Where to write the result."""


def sqnr(out: Tensor, exact: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB: 20 log10(|exact| / |out - exact|)."""
    return 20 * math.log10(float(exact.norm() / (out.double() - exact).norm()))


def block_noise(block: Block, x: Tensor) -> tuple[dict[str, float], Tensor]:
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

    exact = linear(normed(x, norm1), *wide(qkv_weights))
    noise = {"qkv": sqnr(int8_linear(x, *qkv_weights, norm=norm1), exact)}
    mixed = attention(exact.float(), attn.num_heads)
    exact = linear(mixed.double(), *wide(proj_weights))
    noise["proj"] = sqnr(int8_linear(mixed, *proj_weights), exact)
    x = x + exact.float()
    exact = gelu_mlp(normed(x, norm2), *wide(mlp_weights))
    noise["mlp"] = sqnr(int8_gelu_mlp(x, *mlp_weights, norm=norm2), exact)
    return noise, x + exact.float()


def operator_noise(model: DeiT, images: Tensor) -> dict[str, list[float]]:
    """SQNR in dB of every operator, a list over the blocks."""
    found: dict[str, list[float]] = {"qkv": [], "proj": [], "mlp": []}
    x = model.embed(images)
    for block in model.blocks:
        noise, x = block_noise(block, x)
        for name, decibels in noise.items():
            found[name].append(round(decibels, 2))
    return found


def logits(model: DeiT, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(500)])


@torch.inference_mode()
def compare(model: DeiT, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """fp32 against int8 on labelled images; the model is left as it was."""
    plain = logits(model, images)
    noise = operator_noise(model, images[:256])
    fuse(model, dtype="int8")
    quantised = logits(model, images)
    unfuse(model)
    right = lambda out: 100 * float((out.argmax(1) == labels).float().mean())
    agreement = 100 * float((plain.argmax(1) == quantised.argmax(1)).float().mean())
    return {
        "images": len(images),
        "top1_fp32": round(right(plain), 2),
        "top1_int8": round(right(quantised), 2),
        "agreement": round(agreement, 2),
        "logits_sqnr_db": round(sqnr(quantised, plain.double()), 2),
        "operator_sqnr_db": noise,
    }


def held_out(options: Options, about: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The images that the network is judged by, as `deit eval` shows them, and their labels."""
    source = open_source(options.data, "val", limit=options.limit)
    size, crop = about["network"]["img_size"], about["options"]["recipe"]["eval_crop"]
    transform = evaluation_transform(size, crop, tuple(about["mean"]), tuple(about["std"]))
    order = in_order(len(source), 500)
    loader = Loader(source, transform, order, seed=0, workers=0, device=torch.device("cpu"))
    batches = list(loader)
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0; 1 beyond 0.3 points of top-1 or below 99 % agreement."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = tyro.cli(Options, args=given, description=__doc__)
    model, about = networks.restore(options.run)
    if not isinstance(model, DeiT):
        raise SystemExit(f"run: expected a DeiT of this package; got {about['network']['arch']}")
    result = compare(model, *held_out(options, about))
    command = " ".join(["python bench/int8_accuracy.py", *evidence.command_line(given).split()[2:]])
    shape = f"DeiT of {model.config.depth} blocks of {model.config.embed_dim} channels"
    row = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "kernels_sha256": evidence.kernels_sha256(),
        **devices.describe(torch.device("cpu")),
        "model": f"{shape}, {options.data}, {about['options']['recipe']['epochs']} epochs",
        **result,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")
    change = abs(result["top1_fp32"] - result["top1_int8"])
    return 0 if change <= 0.3 and result["agreement"] >= 99.0 else 1


if __name__ == "__main__":
    sys.exit(main())
