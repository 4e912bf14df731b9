"""Linear layers on the CPU by oneDNN, with bias, GELU and residual fused into its product.

PyTorch's own fp32 linear layer is MKL's, which runs far below this product on processors that
are not Intel's; oneDNN comes with every torch, behind the operator that Inductor uses too.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Asked once: torch.compile does not trace into the question.
_AVAILABLE = torch.backends.mkldnn.is_available()

# What the product's result passes through: its name, its numbers, its algorithm.
PostOp = tuple[str, list[float], str]
_NO_POST_OP: PostOp = ("none", [], "")
_GELU: dict[str, PostOp] = {"gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh")}


def why_not(x: Tensor, *weights: Tensor) -> list[str]:
    """Why oneDNN cannot run a product of these; empty where it can."""
    found = []
    if not _AVAILABLE:
        found.append("this torch is built without oneDNN")
    if x.dtype != torch.float32:
        found.append(f"dtype {x.dtype} (fp32 only: half precision runs on oneDNN in PyTorch)")
    if any(0 in t.shape for t in (x, *weights)):
        found.append("an empty axis, which oneDNN does not take")
    return found


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """`deit.kernels.linear`; the residual joins in the product where nothing scales the branch."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if activation is None and gamma is None and keep is None and residual is not None:
        other = residual.contiguous()
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
    post_op = _NO_POST_OP if activation is None else _GELU[activation]
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *post_op)
    if gamma is not None:
        y.mul_(gamma)
    if keep is not None:
        y.mul_(keep.view(-1, *[1] * (y.dim() - 1)))
    return y if residual is None else y.add_(residual)


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """`deit.kernels.gelu_mlp` as two products, GELU inside the first."""
    hidden = linear(x, w1, b1, "gelu", None, None, None)
    return linear(hidden, w2, b2, None, residual, gamma, keep)
