"""The CUDA library's products: which of its two kernels takes a call on Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

from deit.kernels.engine import limits


def unmeasured(
    x: Tensor,
    *weights: Tensor,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> bool:
    """Whether a call goes to the kernel for every GPU (csrc/cuda/linear.cu) where the figures of
    its class are of Hopper's own (linear_hopper.cu, whose `hopper_takes` this is)."""
    if limits.capability(x.device.type, x.device.index) != (9, 0) or x.dtype == torch.float32:
        return False
    return not (
        all(w.shape[0] % 8 == 0 and w.shape[1] % 8 == 0 and w.shape[1] > 0 for w in weights)
        and activation in (None, "gelu", "gelu_tanh")
        and all(t is None or t.dtype == x.dtype for t in (residual, gamma))
        and keep is None
    )
