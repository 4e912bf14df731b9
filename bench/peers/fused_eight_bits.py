"""This package's own inference in 8 bits, as peers beside other runtimes' and checked like them."""

from __future__ import annotations

import functools

import torch

from deit.fused_vit import fuse
from deit.kernels import fp8
from peers.peer import ALL, Built, Peer, Problem, twin

_PHOTOGRAPHS = ("skimage", "sklearn")  # those of the check
_INSTALL = "pip install scikit-image scikit-learn"


def _build(problem: Problem, dtype: str) -> Built:
    module = twin(problem.module)
    fuse(module, problem.impl, dtype=dtype)
    return Built(module, f"fuse(model, dtype={dtype!r})")


def _lacking_fp8() -> str:
    return "; ".join(fp8.why_not(torch.device("cuda", torch.cuda.current_device())))


PEERS = (
    Peer(
        "fused-int8",
        "fused int8",
        functools.partial(_build, dtype="int8"),
        _PHOTOGRAPHS,
        _INSTALL,
        precision="int8",
    ),
    Peer(
        "fused-fp8",
        "fused fp8",
        functools.partial(_build, dtype="fp8"),
        _PHOTOGRAPHS,
        _INSTALL,
        precision="fp8",
        devices=("cuda",),
        dtypes=ALL,
        also=_lacking_fp8,
    ),
)
