"""Schemas and fakes of attention (arXiv 1706.03762); lse, the rows' log of sums, is fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from deit.kernels.engine.registry import CSRC, define


def _attention(qkv: Tensor, *_: object) -> Tensor:
    batch, tokens, channels = qkv.shape
    return qkv.new_empty((batch, tokens, channels // 3))


def _fwd(qkv: Tensor, num_heads: int, *_: object) -> tuple[Tensor, Tensor]:
    batch, tokens, _channels = qkv.shape
    lse = qkv.new_empty((batch, num_heads, tokens), dtype=torch.float32)
    return _attention(qkv), lse


def _bwd(dout: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


_GEOMETRY = "int num_heads, float scale"
_FORWARD, _BACKWARD = "attention.triton", "attention.triton_bwd"


def _define(name: str, options: str, **kernels: str) -> None:
    inputs = f"Tensor qkv, {_GEOMETRY}, {options}"
    saved = f"Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_GEOMETRY}, {options}"
    define(name, f"({inputs}) -> Tensor", _attention, cpu=CSRC, triton=_FORWARD, **kernels)
    forward = f"({inputs}) -> (Tensor out, Tensor lse)"
    define(f"{name}_fwd", forward, _fwd, cpu=CSRC, triton=_FORWARD)
    define(f"{name}_bwd", f"({saved}) -> Tensor dqkv", _bwd, cpu=CSRC, triton=_BACKWARD)


# Apart, so that a call without rotary positions passes nothing for them.
_define("attention", "Tensor? key_bias", cuda=CSRC)
_define("rotary_attention", "Tensor sin, Tensor cos, int prefix, bool interleaved")
