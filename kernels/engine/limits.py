"""Why kernels cannot take a call's arguments: the reasons that several operators share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import native
from deit.kernels.engine.tracing import constant_when_traced

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unserved(*arguments: Any) -> list[str]:
    """Why kernels cannot take these tensors' dtypes."""
    dtypes = (a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    return [f"dtype {d} (fp32, fp16 and bf16 are served)" for d in dtypes if d not in KERNEL_DTYPES]


def product_limits(implementation: str, x: Tensor, *weights: Tensor) -> list[str]:
    """For operators that are matrix products of x [..., K] and weights [M, K]."""
    if implementation == "cublaslt" and any(w.shape[-1] == 0 for w in weights):
        return [*cuda_limits(x), "an empty axis to sum over"]
    if implementation in ("cuda", "cublaslt"):
        return cuda_limits(x)
    if implementation != "cpu":
        return []
    isa, dtype, found = cpu_isa(), x.dtype, []
    if isa == "portable":
        found.append("no AVX2 or NEON here, and PyTorch's products beat the portable ones")
    if dtype == torch.float16:
        found.append("dtype torch.float16 (its products are for fp32 and bf16)")
    if dtype == torch.bfloat16 and isa not in ("avx512_bf16", "neon_bf16"):
        found.append(f"bf16 products need AVX512-BF16 or Arm's BF16, this processor has {isa}")
    if dtype == torch.bfloat16 and any(w.shape[-1] % 2 for w in weights):
        found.append("an odd depth, where bf16 products take pairs")
    for tensor in (x, *weights):  # a generator's set-up alone would double this
        if tensor.numel() == 0:
            found.append("an empty axis")
            break
    return found


def cuda_limits(x: Tensor) -> list[str]:
    """For the CUDA library's kernels that copy asynchronously."""
    major, minor = capability(x.device.type, x.device.index)
    if major < 8:
        return [f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"]
    return []


@constant_when_traced
def capability(device_type: str, index: int | None) -> tuple[int, int]:
    """A GPU's compute capability; (0, 0) of any other device."""
    return torch.cuda.get_device_capability(index) if device_type == "cuda" else (0, 0)


@constant_when_traced
def cpu_isa() -> str:
    """The instruction set that the C++ library uses; asked once a process."""
    return native.cpu_isa()
