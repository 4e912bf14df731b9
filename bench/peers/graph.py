"""One CUDA graph of the whole forward, fused and eager: what is left once the host is out of it.

torch.compile's max-autotune replays graphs of its own. No graph here has run on a GPU yet.
"""

from __future__ import annotations

import functools

from deit.fused_vit import compile_graph, fuse
from peers.peer import ALL, Built, Peer, Problem, on_cuda, twin


def _build(problem: Problem, fused: bool) -> Built:
    module = twin(problem.module)
    if fused:
        fuse(module, problem.impl)
    return Built(compile_graph(module, problem.images), "compile_graph(model, batch)")


def _peer(name: str) -> Peer:
    build = functools.partial(_build, fused=name == "fused")
    return on_cuda(f"{name}-graph", f"{name}, one CUDA graph", build, dtypes=ALL)


PEERS = (_peer("fused"), _peer("eager"))
