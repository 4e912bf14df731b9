"""torch.compile: Inductor as it comes, and searching for the fastest of everything it can make."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peers.peer import Built, Peer, Problem

ALL = (torch.float32, torch.float16, torch.bfloat16)


def _build(problem: Problem, mode: str) -> Built:
    """Inductor in `mode`; with it, in inference on a CPU, freezing: weights packed for oneDNN."""
    options = dict(torch._inductor.list_mode_options(mode))
    about = f"torch.compile, mode {mode}"
    on_cpu = problem.images.device.type == "cpu"
    if mode == "max-autotune" and on_cpu and not problem.module.training:
        options["freezing"] = True
        about += ", freezing"
    compiled = torch.compile(problem.module, options=options, dynamic=False)

    def call(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # it may reuse the last call's output memory
        return compiled(images)

    return Built(call, about)


PEERS = (
    Peer(
        "compile",
        "compiled",
        functools.partial(_build, mode="default"),
        devices=("cpu", "cuda"),
        dtypes=ALL,
        trains=True,
        compile_mode="default",
    ),
    Peer(
        "compile-max",
        "compiled, max-autotune",
        functools.partial(_build, mode="max-autotune"),
        devices=("cpu", "cuda"),
        dtypes=ALL,
        trains=True,
        compile_mode="max-autotune",
    ),
)
