"""Products in 8-bit integers beside the fp32 ones of the same calls, forward, on a CPU.

Ours read and write fp32 and quantise on the way. PyTorch's best is oneDNN's product as
bench/int8_kernels.py has it: its input comes quantised, and what follows the bias is an operation
of its own. It has none for a whole MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deit.kernels.prove.calls import Call
from int8_kernels import onednn_int8
from operators.measure import Function

MATRICES = {"linear": ("weight",), "gelu_mlp": ("w1", "w2")}  # quantised before, and kept
# Relative L2 distance of outputs from eager's: 8 bits of normal numbers are off by 1 %.
ALLOWED = 5e-2


def is_int8(name: str) -> bool:
    """Is it a contender in 8-bit integers?"""
    return "int8" in name


def contenders(call: Call, backward: bool) -> dict[str, Function]:
    """Name -> Function; none for other operators, devices and dtypes, and in the backward."""
    given = next(iter(call.inputs.values()))
    fits = call.operator in MATRICES and given.device.type == "cpu" and not backward
    if not fits or given.dtype != torch.float32 or call.options:
        return {}
    import deit.kernels

    ours = getattr(deit.kernels, f"int8_{call.operator}")
    found: dict[str, Function] = {"cpu int8": lambda inputs: ours(**inputs, impl="cpu")}
    if call.operator == "linear":
        found["oneDNN int8"] = _onednn()
    return found


def _onednn() -> Function:
    """linear by oneDNN; an input set is quantised and packed when it first comes."""
    products: dict[int, Callable[[], Tensor]] = {}

    def run(inputs: dict[str, Any]) -> Tensor:
        x, weight = inputs["x"], inputs["weight"]
        if id(weight) not in products:
            products[id(weight)] = onednn_int8(x.flatten(0, -2), weight, inputs["bias"])
        out = products[id(weight)]().view(*x.shape[:-1], -1)
        return out + inputs["residual"] if "residual" in inputs else out

    return run


def saved_bytes(call: Call) -> float:
    """How many bytes fewer than in fp32: a matrix takes a byte an element and a scale a row."""
    matrices = (call.inputs[name] for name in MATRICES[call.operator])
    return float(sum(3 * matrix.numel() - 4 * len(matrix) for matrix in matrices))
