"""XNNPACK by ExecuTorch: the exported network, lowered to whatever of it XNNPACK takes.

What it does not take runs on ExecuTorch's own kernels; the row says which operators those are.
"""

from __future__ import annotations

import collections
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from peers.peer import Built, Peer, Problem, quietly


def _left(program: Any) -> str:
    """The operators that no delegate took, with their number: "12 layer_norm, 1 cat"."""
    counts: collections.Counter[str] = collections.Counter()
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name not in ("executorch_call_delegate", "getitem"):
            counts[name.split(".")[-2] if "." in name else name] += 1
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"


def _build(problem: Problem) -> Built:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    with quietly(), torch.no_grad():
        exported = torch.export.export(problem.module, (problem.images,))
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        left = _left(edge.exported_program())
        program = edge.to_executorch()
    # One pool a process, which has a thread a core until it is told otherwise.
    portable_lib._unsafe_reset_threadpool(problem.threads)
    loaded = Runtime.get().load_program(program.buffer)
    loaded.load_method("forward")

    def call(images: Tensor) -> Tensor:
        # By the program each time: a method that outlives it reads memory that is gone.
        logits: Tensor = loaded.load_method("forward").execute([images])[0]
        return logits

    version = importlib.metadata.version("executorch")
    about = f"executorch {version}, XNNPACK, {problem.threads} threads; not by XNNPACK: {left}"
    return Built(call, about)


PEERS = (Peer("xnnpack", "XNNPACK", _build, ("executorch",), counted=False),)
