"""Images/s of the ViTs people run, a small model a family: fused, eager, and by peers.

    python bench/families.py                    # a table in Markdown, some 20 minutes on two cores
    python bench/families.py --only dinov3 eva02 --bs 16 --peers compile

Random weights, random images of the model's own size, fp32 on the CPU. Every contender's output is
checked against the eager model's in fp64 before anybody is timed, and all are timed in interleaved
rounds. Ratios are medians of paired ones: the other's time over the fused model's.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import peers
from deit.commands import flags
from deit.fused_vit import fuse
from evidence.timing import Clock, Comparison, compare, interleave, spread
from peers import Problem
from race.checks import FLOORS, distance


@dataclass(frozen=True)
class Family:
    """A family by its smallest common model: timm's name, or a configuration of transformers.

    size: pixels a side of its images. register_tokens: given to timm's model, if not None.
    """

    name: str
    model: str
    size: int = 224
    register_tokens: int | None = None

    def build(self) -> nn.Module:
        """The model with random weights, in evaluation mode, giving one tensor."""
        if self.model in TRANSFORMERS:
            return _Tower(TRANSFORMERS[self.model](self.size)).eval()
        import timm

        more = {} if self.register_tokens is None else {"reg_tokens": self.register_tokens}
        own = timm.get_pretrained_cfg(self.model)
        sized = {"img_size": self.size} if own and own.input_size[-1] != self.size else {}
        return timm.create_model(self.model, num_classes=1000, **more, **sized).eval()


class _Tower(nn.Module):
    """A vision tower of transformers from images to its last hidden state alone."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(pixel_values=images).last_hidden_state


def _transformers(kind: str, model: str, **settings: int | bool) -> Callable[[int], nn.Module]:
    def build(size: int) -> nn.Module:
        import transformers

        config = getattr(transformers, kind)(image_size=size, **settings)
        return getattr(transformers, model)(config)

    return build


SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
WIDE = {**SMALL, "intermediate_size": 1536}
TRANSFORMERS = {
    "ViTModel": _transformers("ViTConfig", "ViTModel", **WIDE),
    "Dinov2Model": _transformers("Dinov2Config", "Dinov2Model", **SMALL, patch_size=14),
    "DINOv3ViTModel": _transformers(
        "DINOv3ViTConfig", "DINOv3ViTModel", **WIDE, patch_size=16, num_register_tokens=4
    ),
    "CLIPVisionModel": _transformers("CLIPVisionConfig", "CLIPVisionModel", **WIDE, patch_size=16),
    "SiglipVisionModel": _transformers("SiglipVisionConfig", "SiglipVisionModel", **WIDE),
}
FAMILIES = (
    Family("ViT", "vit_small_patch16_224"),
    Family("ViT, 4 registers", "vit_small_patch16_224", register_tokens=4),
    Family("DINOv3", "vit_small_patch16_dinov3"),
    Family("EVA-02", "eva02_tiny_patch14_224"),
    Family("EVA-02 S", "eva02_small_patch14_224"),
    Family("RoPE-ViT", "vit_small_patch16_rope_224"),
    Family("RoPE-ViT mixed", "vit_small_patch16_rope_mixed_224"),
    Family("DINOv2, registers", "vit_small_patch14_reg4_dinov2", size=224),
    Family("DeiT III", "deit3_small_patch16_224"),
    Family("CLIP", "vit_base_patch32_clip_224"),
    Family("SigLIP", "vit_base_patch32_siglip_256", size=256),
    Family("BEiT v2", "beitv2_base_patch16_224"),
    Family("PE", "vit_pe_core_tiny_patch16_384", size=384),
    Family("AIMv2", "aimv2_large_patch14_224"),
    Family("Hugging Face ViT", "ViTModel"),
    Family("Hugging Face DINOv2", "Dinov2Model"),
    Family("Hugging Face DINOv3", "DINOv3ViTModel"),
    Family("Hugging Face CLIP", "CLIPVisionModel"),
    Family("Hugging Face SigLIP", "SiglipVisionModel"),
)


@dataclass(frozen=True)
class Options:
    """Which families, and for how long."""

    only: tuple[str, ...] = ()
    """only the families with one of these words in their names or models"""
    bs: int = 8
    """images in a batch"""
    peers: tuple[str, ...] = ("compile", "openvino")
    """what else runs them, beside eager, by the names of bench/throughput.py"""
    seconds: float = 30.0
    """timed seconds for a family"""
    out: Path | None = None
    """write the table there, too, a line as soon as it is known"""


def contenders(family: Family, images: Tensor, names: tuple[str, ...]) -> Iterator[tuple]:
    """(how, call) of every way to run a family; what is not installed or does not build is told."""
    eager = family.build()
    yield "eager", eager
    fused = copy.deepcopy(eager)
    fuse(fused, example=images)
    yield "fused", fused
    for peer in peers.chosen(names, "cpu"):
        reason = peer.why_not("cpu", images.dtype, False)
        try:
            if reason:
                raise RuntimeError(reason)
            problem = Problem(copy.deepcopy(eager), None, images, torch.get_num_threads())
            call = peer.build(problem).call
            call(images)
        except Exception as error:  # a peer's own failure is a result of the comparison
            print(f"{family.name}: {peer.how} left out: {error}"[:300], file=sys.stderr)
        else:
            yield peer.how, call


def measure(family: Family, options: Options) -> dict[str, list[float]]:
    """Seconds a batch by contender, in the same rounds.

    Raises RuntimeError where an output is off by more than twice the eager model's own error.
    """
    with torch.inference_mode():
        images = torch.randn(options.bs, 3, family.size, family.size)
        ways = dict(contenders(family, images, options.peers))
        wide = copy.deepcopy(ways["eager"]).double()
        truth = wide(images[:1].double())
        del wide
        own = distance(ways["eager"](images)[:1], truth)
        for how, call in ways.items():
            error = distance(call(images)[:1], truth)
            if not error <= 2 * own + FLOORS[torch.float32]:
                raise RuntimeError(
                    f"{family.name}: {how} is off by {error:.1e}, eager by {own:.1e}"
                )
        clock, batches = Clock(images.device), [torch.empty_like(images) for _ in range(2)]

        def step(call: Callable[[Tensor], object]) -> Callable[[int], float]:
            def once(turn: int) -> float:
                time.sleep(5e-3)  # another runtime's threads may spin on
                return clock.time(lambda: call(batches[turn % 2]))

            return once

        steps = [step(call) for call in ways.values()]
        began = time.perf_counter()
        samples = interleave(
            steps, 200, before=lambda *_: [batch.normal_() for batch in batches],
            enough=lambda done: done >= 6 and time.perf_counter() - began > options.seconds,
        )  # fmt: skip
    return dict(zip(ways, samples, strict=True))


def row(family: Family, taken: dict[str, list[float]], options: Options) -> str:
    """A line of the table."""
    fused, others = taken["fused"], {how: s for how, s in taken.items() if how != "fused"}
    speed = options.bs / spread(fused).median
    hows = ["eager", *(peer.how for peer in peers.chosen(options.peers, "cpu"))]
    cells = [_cell(compare(fused, others[how])) if how in others else "" for how in hows]
    best = min(others, key=lambda how: spread(others[how]).median)
    name = family.model + (" with 4 registers" if family.register_tokens else "")
    named = f"{family.name} (`{name}`, {family.size} px)"
    return f"| {named} | {speed:.1f} | {' | '.join(cells)} | {best} | {len(fused)} |"


def _cell(found: Comparison) -> str:
    if found.low is None:
        return f"{found.ratio:.2f}"
    return f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where a family could not be measured."""
    options = flags.parse(Options, arguments, __doc__)
    chosen = [
        family
        for family in FAMILIES
        if not options.only
        or any(w.lower() in f"{family.name} {family.model}".lower() for w in options.only)
    ]
    if options.bs < 1 or not options.seconds >= 0:
        got = f"{options.bs} and {options.seconds}"
        print(f"error: bs, seconds: expected at least 1 and at least 0; got {got}", file=sys.stderr)
        return 2
    if not chosen:
        print(f"error: only: no family has {' or '.join(options.only)} in it", file=sys.stderr)
        return 2
    hows = ["eager", *(peer.how for peer in peers.chosen(options.peers, "cpu"))]
    head = f"| model | images/s fused | {' | '.join(f'over {h}' for h in hows)} | best other | n |"
    lines, failed = [head, "|---" * (len(hows) + 4) + "|"], False
    print("\n".join(lines), flush=True)
    for family in chosen:
        torch.compiler.reset()
        gc.collect()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lines.append(row(family, measure(family, options), options))
        except Exception as error:  # the others are still worth a line
            failed = True
            print(f"{family.name}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
            continue
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
