"""One CUDA graph of the whole forward, fused and eager: what is left once the host is out of it.

torch.compile's max-autotune replays graphs of its own. No graph here has run on a GPU yet.
"""

from __future__ import annotations

import functools

from deit.fused_vit import compile_graph, fuse
from peers.peer import ALL, Built, Peer, Problem, twin


def _build(problem: Problem, fused: bool) -> Built:
    module = twin(problem.module)
    if fused:
        fuse(module, problem.impl)
    return Built(compile_graph(module, problem.images), "compile_graph(model, batch)")


PEERS = tuple(
    Peer(
        f"{name}-graph",
        f"{name}, one CUDA graph",
        functools.partial(_build, fused=name == "fused"),
        devices=("cuda",),
        dtypes=ALL,
    )
    for name in ("fused", "eager")
)
