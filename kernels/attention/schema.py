"""Schemas and fakes of attention (arXiv 1706.03762); lse, the rows' log of sums, is fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from deit.kernels.engine.registry import CSRC, define


def _attention(qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None) -> Tensor:
    batch, tokens, channels = qkv.shape
    return qkv.new_empty((batch, tokens, channels // 3))


def _fwd(
    qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = qkv.shape
    lse = qkv.new_empty((batch, num_heads, tokens), dtype=torch.float32)
    return _attention(qkv, num_heads, scale, key_bias), lse


def _bwd(dout: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


_INPUTS = "Tensor qkv, int num_heads, float scale, Tensor? key_bias"
_FORWARD, _BACKWARD = "attention.triton", "attention.triton_bwd"

define("attention", f"({_INPUTS}) -> Tensor", _attention, cpu=CSRC, triton=_FORWARD)
define("attention_fwd", f"({_INPUTS}) -> (Tensor out, Tensor lse)", _fwd, cpu=CSRC, triton=_FORWARD)
define(
    "attention_bwd",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, float scale, "
    "Tensor? key_bias) -> Tensor dqkv",
    _bwd,
    cpu=CSRC,
    triton=_BACKWARD,
)
