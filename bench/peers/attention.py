"""The eager model with its attention replaced: xFormers' and flash-attn's kernels, CUDA only.

Both take q, k and v as views of the packed projection, so that nothing is copied on the way. The
adapters are tested with the packages' documented signatures; they have not been run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable

from torch import Tensor

from deit.model import Attention
from peers.peer import FLASH, HALVES, Built, Peer, Problem, on_cuda, twin

Attend = Callable[[Tensor, float], Tensor]


def _xformers() -> Attend:
    """Layout [B, N, H, d]; it chooses among its own kernels."""
    ops = importlib.import_module("xformers.ops")
    return lambda qkv, scale: ops.memory_efficient_attention(*qkv.unbind(2), scale=scale)


def _flash_attn() -> Attend:
    """FlashAttention-2, packed, [B, N, 3, H, d]."""
    flash = importlib.import_module("flash_attn")
    return lambda qkv, scale: flash.flash_attn_qkvpacked_func(qkv, softmax_scale=scale)


def _flash_attn_3() -> Attend:
    """FlashAttention-3, for sm_90; its first releases return the log-sum-exp beside the output."""
    flash = importlib.import_module("flash_attn_interface")

    def attend(qkv: Tensor, scale: float) -> Tensor:
        out = flash.flash_attn_func(*qkv.unbind(2), softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out

    return attend


class _Replaced(Attention):
    """Attention by another library: `attend(qkv, scale)`, [B, N, 3, H, d] -> [B, N, H, d]."""

    attend: Attend

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        return self.proj(self.attend(qkv, self.scale).reshape(batch, tokens, dim))


def _build(problem: Problem, load: Callable[[], Attend], distribution: str) -> Built:
    attend = load()
    module = twin(problem.module)
    replaced = [part for part in module.modules() if type(part) is Attention]
    if not replaced:
        raise ValueError("network: expected a DeiT, whose attention can be replaced")
    for part in replaced:
        part.__class__ = _Replaced
        part.attend = attend
    return Built(module, f"{distribution} {importlib.metadata.version(distribution)}, eager")


def _peer(
    name: str, load: Callable[[], Attend], distribution: str, package: str, install: str = ""
) -> Peer:
    build = functools.partial(_build, load=load, distribution=distribution)
    return on_cuda(name, f"eager, {name}", build, (package,), install, dtypes=HALVES)


PEERS = (
    _peer("xformers", _xformers, "xformers", "xformers"),
    _peer("flash-attn", _flash_attn, "flash-attn", *FLASH[2]),
    _peer("flash-attn-3", _flash_attn_3, "flash_attn_3", *FLASH[3]),
)
