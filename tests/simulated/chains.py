"""PyTorch's fp32 with each product's terms added one after another, as a GPU's plain cores do.

The rule compares a kernel with PyTorch on the same device. A CPU's products add in many short
chains, whose error is smaller: by that measure an exact fp32 kernel of a GPU fails (by 1.7 for
patch_embed's d weight). So in fp32 the yardstick's products are one chain each, of multiply-adds
that round once, by the tool's own arithmetic.

Attention's gradient subtracts the sum of dout * out from the products dout vT, as PyTorch's fused
kernels do on a GPU in fp32 too. PyTorch's own softmax sums what it subtracts in another way: where
one key takes everything it is exactly 0, and a fused kernel's rounding is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from simulator import ops
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_attention = aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward


def _product(a: Tensor, b: Tensor, start: Tensor | float = 0.0) -> Tensor:
    a, b = (t.detach().contiguous().numpy() for t in (a, b))
    start = start.detach().numpy() if isinstance(start, Tensor) else start
    return torch.from_numpy(ops._fma_chain(a, b, np.asarray(start), np.float32))


def _patches(images: Tensor, patch: torch.Size) -> Tensor:
    """[B, C, H, W] as [patches, C * P * P]; patches do not overlap."""
    tiles = images.unfold(2, patch[0], patch[0]).unfold(3, patch[1], patch[1])
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)


def _convolution(images: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    batch, _, height, width = images.shape
    down, across = height // weight.shape[2], width // weight.shape[3]
    start = 0.0 if bias is None else bias
    out = _product(_patches(images, weight.shape[2:]), weight.flatten(1).T, start)
    return out.view(batch, down, across, -1).permute(0, 3, 1, 2).contiguous()


def _convolution_backward(dout: Tensor, images: Tensor, weight: Tensor, *_: Any) -> Any:
    rows = dout.permute(0, 2, 3, 1).flatten(0, 2)
    dweight = _product(rows.T, _patches(images, weight.shape[2:]))
    return None, dweight.view_as(weight), rows.sum(0)


def _scores(q: Tensor, k: Tensor, scale: float, attn_mask: Tensor | None) -> Tensor:
    scores = _product(q, k.mT) * scale
    return scores if attn_mask is None else scores + attn_mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *_: Any,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of q, k and v [B, H, N, d]; a query with no key is none of the calls'."""
    scores = _scores(q, k, scale or q.shape[-1] ** -0.5, attn_mask)
    return _product(scores.softmax(-1), v), scores.logsumexp(-1)


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scale = scale or q.shape[-1] ** -0.5
    p = (_scores(q, k, scale, attn_mask) - lse[..., None]).exp()
    ds = p * (_product(dout, v.mT) - (dout * out).sum(-1, keepdim=True)) * scale
    return _product(ds, k), _product(ds.mT, q), _product(p.mT, dout)


_CHAINS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: lambda start, a, b: _product(a, b, start),
    _attention.default: _attend,
    _attention_backward.default: _attend_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
_OF_SCORES = {"attn_mask", "scale"}  # the options that some of these take


class _OneChain(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CHAINS and args[0].dtype == torch.float32 and kwargs.keys() <= _OF_SCORES:
            return _CHAINS[func](*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def one_chain() -> Iterator[None]:
    """Inside, PyTorch's products in fp32 are one chain each, attention's too."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), _OneChain():
        yield
