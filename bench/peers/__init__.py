"""The peers that fused models are measured against, each one small adapter in this folder.

A new peer is a module with a `PEERS` tuple and its name in `_ADAPTERS`; its package is imported
where it is built and not before.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from peers.peer import Built, Call, Peer, Problem

__all__ = ["PEERS", "Built", "Call", "Peer", "Problem", "chosen"]

_ADAPTERS = (
    "torch_compile",
    "graph",
    "timm",
    "transformers",
    "torchvision",
    "attention",
    "onnxruntime",
    "openvino",
    "xnnpack",
    "zentorch",
    "tensorrt",
    "fused_eight_bits",
    "jax",  # the last: once it runs, a process had better not fork, as others do
)
# By name, in the order of the tables.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for adapter in _ADAPTERS
    for peer in importlib.import_module(f"peers.{adapter}").PEERS
}
# What `default` stands for; eager always runs, as the yardstick of logits and of speed.
DEFAULT = {"cpu": ("compile",), "cuda": ("compile-max", "fused-graph")}


def chosen(names: Sequence[str], device: str) -> list[Peer]:
    """The peers asked for: `default`, `all`, `none`, or names, also joined by commas.

    Raises ValueError for a name that no peer has.
    """
    asked = [name for each in names for name in each.split(",") if name]
    meant: dict[str, None] = {}
    for name in asked:
        if name == "default":
            meant |= dict.fromkeys(DEFAULT[device])
        elif name == "all":
            meant |= dict.fromkeys(PEERS)
        elif name in PEERS:
            meant[name] = None
        elif name not in ("none", "eager"):
            known = ", ".join(("default", "all", "none", "eager", *PEERS))
            raise ValueError(f"peers: unknown name {name!r}; known: {known}")
    return [peer for name, peer in PEERS.items() if name in meant]
