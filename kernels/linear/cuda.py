"""The CUDA library's products: which calls go to another kernel than a class's figures are of."""

from __future__ import annotations

import torch
from torch import Tensor

from deit.kernels.engine import limits


def unmeasured(
    implementation: str,
    x: Tensor,
    *weights: Tensor,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> bool:
    """Whether "auto" passes an implementation over.

    "cuda": a call goes to the kernel for every GPU (csrc/cuda/linear.cu) where the figures of its
    class are of Hopper's own (linear_hopper.cu, whose `hopper_takes` this is). "cublaslt": it takes
    a second kernel for LayerScale or stochastic depth, which no class tells apart.
    """
    if implementation == "cublaslt":
        return gamma is not None or keep is not None
    if implementation != "cuda":
        return False
    if limits.capability(x.device.type, x.device.index) != (9, 0) or x.dtype == torch.float32:
        return False
    return not (
        all(w.shape[0] % 8 == 0 and w.shape[1] % 8 == 0 and w.shape[1] > 0 for w in weights)
        and activation in (None, "gelu", "gelu_tanh")
        and all(t is None or t.dtype == x.dtype for t in (residual, gamma))
        and keep is None
    )
