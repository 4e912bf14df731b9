"""What the CUDA library's products (csrc/cuda/linear.cu) take: Hopper's units, half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from deit.kernels.engine.tracing import constant_when_traced


def limits(
    x: Tensor,
    *weights: Tensor,
    activation: str | None,
    residual: Tensor | None,
    keep: Tensor | None,
) -> list[str]:
    """Why they cannot multiply x [..., K] by these [M, K] weights, with such an epilogue."""
    found = []
    major, minor = _capability(x.device.type, x.device.index)
    if (major, minor) != (9, 0):
        found.append(f"its products are for compute capability 9.0, this GPU has {major}.{minor}")
    if x.dtype == torch.float32:
        found.append("dtype torch.float32 (its products are for fp16 and bf16)")
    for weight in weights:
        width, depth = weight.shape
        if width % 8 or depth % 8 or depth == 0:
            found.append(f"a weight of {width} x {depth} (multiples of 8 are copied)")
            break
    if residual is not None and residual.dtype != x.dtype:
        found.append(f"a residual in {residual.dtype} (x's dtype is served)")
    if activation not in (None, "gelu", "gelu_tanh"):
        found.append(f"activation {activation!r} (its epilogue has GELU, by erf and by tanh)")
    if keep is not None:
        found.append("keep (its epilogue has no stochastic depth)")
    return found


@constant_when_traced
def _capability(device_type: str, index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index) if device_type == "cuda" else (0, 0)
