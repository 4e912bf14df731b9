"""The fastest way to run a model on this device: `fastest(model, images)` races them all."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deit.fused_vit import calls, racing, swapping
from deit.fused_vit.cuda_graph import compile_graph
from deit.fused_vit.modules import Fused

EAGER, FUSED = "eager", "fused"
COMPILED, FUSED_COMPILED = "compiled", "fused and compiled"
GRAPH, FUSED_GRAPH = "eager, one CUDA graph", "fused, one CUDA graph"
BUDGET = 60.0  # seconds of racing; compiling is not counted


class Fastest:
    """The way of running a model that was the fastest, as a callable; made by `fastest`.

    name: which way it is. model: what runs, over the original's parameters; of a CUDA graph the
    graph. table: every way with its time, its ratio to the eager model and the interval of that,
    or why it was refused. Printing it prints the table.
    """

    def __init__(self, name: str, model: Callable[..., Any], table: racing.Race, about: str) -> None:
        self.name, self.model, self.table, self.about = name, model, table, about

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the model returns. A compiled way compiles anew for inputs of other shapes, and a
        CUDA graph raises ValueError for them."""
        return self.model(*inputs, **options)

    def __str__(self) -> str:
        return f"{self.about}\n{self.table}\nfastest: {self.name}"


def fastest(
    model: nn.Module, images: Tensor, *, compile: bool = True, budget: float = BUDGET
) -> Fastest:
    """Race the ways to run `model` on `images` in inference, and return the fastest.

    The ways are eager, fused, each compiled by torch.compile and, on a GPU, each as one CUDA
    graph. All run the parameters that `model` has, which itself stays as it is: eager or fused,
    with its hooks and its mode. The fused one is fused as `fuse` does it, operators measured.
    Outputs are held against the eager model's first; what differs or raises is refused by name.

        run = fastest(model, images)
        print(run)
        logits = run(images)

    Args:
        model: it is run in evaluation mode, without gradients, under the autocast that is on.
        images: like those to come: shape, dtype and device. Other numbers are raced.
        compile: False leaves out torch.compile, which takes minutes on a CPU.
        budget: seconds for the timing, beside compiling and measuring operators.

    Raises:
        TypeError: `model` is not a module, or `images` no tensor. ValueError: `images` on another
        device than the model, or of a shape or dtype that it does not take; a `budget` that is not
        positive, or too short for six rounds.
    """
    from deit.fused_vit import fuse  # this package's own __init__, which imports this file

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    calls.check_example(model, images, "images")
    seconds = calls.check_budget(budget, BUDGET)
    device = images.device
    plain = swapping.twin_of(model, Fused, {}, fused=False).eval()
    fused = swapping.twin_of(model, Fused, {}, fused=False).eval()
    say = speaker()
    report = fuse(fused, example=images)
    ways: dict[str, Callable[[Any], Any]] = {EAGER: plain}
    if report.fused:
        ways[FUSED] = fused
    if device.type == "cuda":
        ways[GRAPH] = _Lazy(lambda: compile_graph(plain, images))
        if report.fused:
            ways[FUSED_GRAPH] = _Lazy(lambda: compile_graph(fused, images))
    if compile:
        ways[COMPILED] = _Lazy(lambda: torch.compile(plain))
        if report.fused:
            ways[FUSED_COMPILED] = _Lazy(lambda: torch.compile(fused))
    say(f"fastest: racing {', '.join(ways)}")
    with torch.no_grad(), calls.same_generators(device):
        started = time.perf_counter()
        race = racing.run(
            ways,
            lambda: torch.randn_like(images) if images.is_floating_point() else images.clone(),
            device,
            images=len(images),
            budget=seconds,
            dtype=calls.coarsest(model, images),
        )
    if race is None:
        raise ValueError(f"budget: expected seconds for six rounds; got {budget}")
    about = (
        f"{type(model).__name__}, {list(images.shape)} {str(images.dtype)[6:]} on {device}, "
        f"{race.rounds} rounds in {time.perf_counter() - started:.0f} s"
    )
    name = race.best()
    way: Any = ways[name]
    return Fastest(name, way.made() if isinstance(way, _Lazy) else way, race, about)
