"""This package's own inference in 8 bits, as peers beside other runtimes' and checked like them."""

from __future__ import annotations

import functools
from typing import Any

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


def _peer(kind: str, **where: Any) -> Peer:
    build = functools.partial(_build, dtype=kind)
    return Peer(f"fused-{kind}", f"fused {kind}", build, _PHOTOGRAPHS, _INSTALL, kind, **where)


PEERS = (_peer("int8"), _peer("fp8", devices=("cuda",), dtypes=ALL, also=_lacking_fp8))
