"""Every operator in plain PyTorch, by name: the definition of what each kernel must compute.

    reference.layer_norm(x, weight, bias, 1e-6)

These run in any float dtype, fp64 included, on any device, and differentiate by autograd. They
are the oracle of the tests (in fp64), the yardstick of the error rule (in the kernel's own
dtype), and what runs where no kernel does. Arguments are those of the operator's schema, in order.
Each operator's folder holds its own, in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deit.kernels  # noqa: F401 - its operators register themselves
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.vit_block.reference import row_stats as row_stats


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return OPERATORS[name].reference
