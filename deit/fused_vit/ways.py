"""The ways to run a model in inference, raced; behind `deit.fused_vit.fastest`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deit.fused_vit import calls, racing, swapping, whole_models
from deit.fused_vit.cuda_graph import compile_graph
from deit.fused_vit.measuring import Speaker
from deit.fused_vit.modules import Fused
from deit.fused_vit.report import Report

EAGER, FUSED = "eager", "fused"
COMPILED, FUSED_COMPILED = "compiled", "fused and compiled"
GRAPH, FUSED_GRAPH = "eager, one CUDA graph", "fused, one CUDA graph"
BUDGET = 60.0  # seconds of timing


class Fastest:
    """The fastest way of running a model, as a callable; made by `fastest`.

    name: which way it is. model: what runs, over the original's parameters: a module, compiled or
    not, or a Graph. race: every way with its time, its ratio to the eager one's and the interval of
    that, or why it was refused. Printing it prints the table.
    """

    def __init__(self, name: str, model: Any, race: racing.Race, about: str) -> None:
        self.name, self.model, self.race, self.about = name, model, race, about

    @torch.no_grad()
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the model returns, without gradients. A compiled way compiles anew for images of
        another shape, and a CUDA graph raises ValueError for them."""
        return self.model(*inputs, **options)

    def __str__(self) -> str:
        return f"{self.about}\n{self.race}\nfastest: {self.name}"


class _Made:
    """A way that is made by its first call, so that an error in the making refuses it alone."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.way: Any = None

    def __call__(self, images: Tensor) -> Any:
        if self.way is None:
            self.way = self.make()
        return self.way(images)


def race(
    model: nn.Module,
    images: Tensor,
    fuse: Callable[[nn.Module], Report],
    *,
    compile: bool,
    budget: float,
) -> Fastest:
    """`fastest` with its arguments checked; `fuse` fuses a twin."""
    device = images.device
    plain, fused = (swapping.twin_of(model, Fused, {}, fused=False).eval() for _ in range(2))
    is_fused = bool(fuse(fused).fused)
    ways: dict[str, Any] = {EAGER: plain}
    if compile:
        ways[COMPILED] = _Made(lambda: torch.compile(plain))
    if device.type == "cuda":
        ways[GRAPH] = _Made(lambda: compile_graph(plain, images))
    if is_fused:
        ways[FUSED] = fused
    if is_fused and compile:
        ways[FUSED_COMPILED] = _Made(lambda: torch.compile(fused))
    if is_fused and device.type == "cuda":
        ways[FUSED_GRAPH] = _Made(lambda: compile_graph(fused, images))

    def others() -> Tensor:
        return torch.randn_like(images) if images.is_floating_point() else images.clone()

    with Speaker() as say, calls.same_generators(device), contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        say.now(f"racing {', '.join(ways)}")
        start = time.perf_counter()
        found = racing.run(
            ways,
            others,
            device,
            images=len(images),
            budget=budget,
            dtype=whole_models.coarsest(model, images.dtype),
        )
    if found is None:
        raise ValueError(f"budget: expected enough seconds for six rounds; got {budget}")
    about = (
        f"{type(model).__name__}, {' x '.join(map(str, images.shape))} {str(images.dtype)[6:]} on "
        f"{device}, {found.rounds} rounds, {time.perf_counter() - start:.0f} s"
    )
    way = ways[found.best()]
    return Fastest(found.best(), way.way if isinstance(way, _Made) else way, found, about)
