"""Products in 8-bit integers at DeiT's shapes, beside oneDNN's int8 and our fp32 product.

    python bench/int8_kernels.py

GOP/s, two a multiply-add. Ours read fp32, normalise and quantise it, multiply, and write fp32 with
bias, GELU or residual; oneDNN's int8 product (torch.ops.onednn.qlinear_pointwise) gets its input
quantised already, one scale a tensor, and writes fp32 with bias. Contenders take turns. Each one's
fastest round counts, which other work on the machine disturbs least; the ratio is the median of
the paired ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import deit
from deit.commands import flags
from deit.kernels import int8_gelu_mlp, int8_linear, linear
from evidence import timing

CLOCK = timing.Clock(torch.device("cpu"))


@dataclass(frozen=True)
class Options:
    """Time products at DeiT's shapes."""

    archs: tuple[str, ...] = ("deit_ti", "deit_s", "deit_b")
    """DeiTs whose shapes to take."""
    bs: int = 16
    """Images in a batch, 197 tokens each."""
    rounds: int = 30
    """Rounds in which every contender is called once."""
    threads: int = 2
    """CPU threads."""


def onednn_int8(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """oneDNN's int8 product on an input quantised beforehand."""
    scale = float(x.abs().max()) / 127
    quantised = (x / scale).round().add(128).clamp(0, 255).to(torch.uint8)
    scales = weight.abs().amax(1) / 127
    integers = (weight / scales[:, None]).round().to(torch.int8)
    prepacked = torch.ops.onednn.qlinear_prepack(integers, list(x.shape))
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    rest = (bias, 1.0, 0, torch.float32, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(
        quantised, scale, 128, prepacked, scales, zeros, *rest
    )


def products(dim: int, rows: int) -> dict[str, tuple[float, dict[str, Callable[[], Tensor]]]]:
    """Product -> (operations, contender -> call) for blocks of this width."""
    x, hidden = torch.randn(rows, dim), torch.randn(rows, 4 * dim)
    norm = (torch.ones(dim), torch.zeros(dim), 1e-6)
    draw = lambda out, depth: (torch.randn(out, depth) * depth**-0.5, torch.zeros(out))
    qkv, proj, fc1, fc2 = (
        draw(out, depth)
        for out, depth in ((3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim))
    )

    def beside(given: Tensor, layer: tuple[Tensor, Tensor], ours: Callable[[], Tensor]) -> dict:
        return {
            "int8": ours,
            "oneDNN int8": onednn_int8(given, *layer),
            "fp32": lambda: linear(given, *layer, impl="cpu"),
        }

    found = {
        "LN, qkv": (x, qkv, lambda: int8_linear(x, *qkv, norm=norm, impl="cpu")),
        "proj + residual": (x, proj, lambda: int8_linear(x, *proj, residual=x, impl="cpu")),
        "fc1, GELU": (x, fc1, lambda: int8_linear(x, *fc1, activation="gelu", impl="cpu")),
        "fc2 + residual": (hidden, fc2, lambda: int8_linear(hidden, *fc2, residual=x, impl="cpu")),
    }
    table = {
        name: (2.0 * rows * layer[0].numel(), beside(given, layer, ours))
        for name, (given, layer, ours) in found.items()
    }
    mlp = {"int8": lambda: int8_gelu_mlp(x, *fc1, *fc2, norm=norm, residual=x, impl="cpu")}
    table["LN, MLP + residual"] = (16.0 * rows * dim * dim, mlp)
    return table


def show(label: str, operations: float, samples: dict[str, list[float]]) -> None:
    """One line: GOP/s of each contender, and ours over each other."""
    shown = [f"{name} {operations / min(s) / 1e9:.0f}" for name, s in samples.items()]
    shown += [
        f"{timing.paired_ratio(s, samples['int8']).median:.2f}x {name}"
        for name, s in samples.items()
        if name != "int8"
    ]
    print(f"{label:<28}" + ", ".join(shown), flush=True)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; always 0."""
    options = flags.parse(Options, arguments, __doc__)
    torch.set_num_threads(options.threads)
    for arch in options.archs:
        config = deit.config(arch)
        with torch.inference_mode(False):  # int8 copies are kept for ordinary tensors only
            table = products(config.embed_dim, options.bs * config.tokens)
        for name, (operations, calls) in table.items():
            steps = [lambda _, call=call: CLOCK.time(call) for call in calls.values()]
            taken = timing.interleave(steps, options.rounds)
            show(f"{arch} {name}", operations, dict(zip(calls, taken, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
