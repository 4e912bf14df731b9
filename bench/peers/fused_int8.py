"""This package's own int8 inference, beside OpenVINO's: as a peer, it is checked like one."""

from __future__ import annotations

import inspect

from deit.fused_vit import fuse
from peers.peer import Built, Peer, Problem, twin


def _lacking() -> str:
    has = "dtype" in inspect.signature(fuse).parameters
    return "" if has else "fuse() of this version has no int8"


def _build(problem: Problem) -> Built:
    module = twin(problem.module)
    fuse(module, dtype="int8")
    return Built(module, "fuse(model, dtype='int8')")


PEERS = (
    Peer(
        "fused-int8",
        "fused int8",
        _build,
        ("skimage", "sklearn"),  # the photographs of the check
        "pip install scikit-image scikit-learn",
        precision="int8",
        also=_lacking,
    ),
)
