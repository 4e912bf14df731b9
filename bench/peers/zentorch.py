"""zentorch, AMD's extension of PyTorch, in a process of its own: it is made for one torch."""

from __future__ import annotations

import functools

import torch

from deit.kernels.engine.processor import processor
from peers import elsewhere
from peers.peer import FP32, Peer


def _lacking() -> str:
    if "avx512_bf16" not in processor()["instruction_sets"]:
        return "it is for processors with AVX512-BF16"
    return elsewhere.why_not("zentorch")


_build = functools.partial(elsewhere.built, package="zentorch")
_DTYPES = (*FP32, torch.bfloat16)
PEERS = (Peer("zentorch", "zentorch", _build, dtypes=_DTYPES, counted=False, also=_lacking),)
