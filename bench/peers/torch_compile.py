"""torch.compile: Inductor as it comes, and searching for the fastest of everything it can make.

Attention is then PyTorch's choice; the peers beside them pin each of its SDPA backends. Flash is
the choice on a CPU, so math alone is another one there. On CUDA the pinned ones have not run yet.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from peers.peer import ALL, HALVES, Built, Peer, Problem


def _build(problem: Problem, mode: str, backend: SDPBackend | None = None) -> Built:
    """Inductor in `mode`; with it, in inference on a CPU, freezing: weights packed for oneDNN."""
    options = dict(torch._inductor.list_mode_options(mode))
    about = f"torch.compile, mode {mode}"
    on_cpu = problem.images.device.type == "cpu"
    if mode == "max-autotune" and on_cpu and not problem.module.training:
        options["freezing"] = True
        about += ", freezing"
    if backend is not None:
        about += f", SDPA {backend.name}"
    compiled = torch.compile(problem.module, options=options, dynamic=False)

    def call(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # it may reuse the last call's output memory
        pinned: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if backend is not None:
            pinned = sdpa_kernel(backend)  # read when it is traced, and guarded on after
        with pinned:
            return compiled(images)

    return Built(call, about)


def _peer(
    mode: str,
    backend: SDPBackend | None = None,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    dtypes: tuple[torch.dtype, ...] = ALL,
) -> Peer:
    how = "compiled" + ("" if mode == "default" else f", {mode}")
    name = "compile" if mode == "default" else "compile-max"
    if backend is not None:
        kind = backend.name.partition("_")[0].lower()
        how, name = f"{how}, {kind} SDPA", f"{name}-{kind}"
    return Peer(
        name,
        how,
        functools.partial(_build, mode=mode, backend=backend),
        devices=devices,
        dtypes=dtypes,
        trains=True,
        compile_mode=mode,
    )


PEERS = (
    _peer("default"),
    _peer("max-autotune"),
    _peer("max-autotune", SDPBackend.MATH),
    _peer("max-autotune", SDPBackend.FLASH_ATTENTION, ("cuda",), HALVES),
    _peer("max-autotune", SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    _peer("max-autotune", SDPBackend.CUDNN_ATTENTION, ("cuda",), HALVES),
)
