"""Triton's interpreter, right where the one at hand is not."""

from __future__ import annotations

import functools
import os
from typing import Any


def interpreted() -> bool:
    """Whether this process runs Triton's kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def mend() -> None:
    """Let the interpreter compute in bf16, and 3.6's run beside NumPy 2.4; nothing outside it.

    It keeps bf16 as its bits, in uint16. `tl.dot` multiplies these as integers (triton#11584): here
    it gets the factors in fp32, which is exact, and sums in fp32. A cast from fp32 cuts off the
    lower bits, and a cast to fp32 reads a denormal wrongly: here the one rounds to nearest even,
    as a GPU does, and the other moves the bits.
    """
    if not interpreted():
        return
    import triton
    from triton.runtime import interpreter

    _multiply_bf16(interpreter)
    _round_to_bf16(interpreter)
    if triton.__version__.startswith("3.6."):
        _take_indices(interpreter)


def _multiply_bf16(interpreter: Any) -> None:
    import numpy as np
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def in_fp32(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    builder.create_dot = lambda self, a, b, *rest: multiply(self, in_fp32(a), in_fp32(b), *rest)


def _round_to_bf16(interpreter: Any) -> None:
    import numpy as np
    import triton.language as tl

    convert, towards_zero = interpreter._convert_float, interpreter._ir.ROUNDING_MODE.RTZ

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16) or mode == towards_zero:
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        return np.where(np.isnan(values), bits >> 16 | 0x40, nearest).astype(np.uint16)

    interpreter._convert_float = rounded


def _take_indices(interpreter: Any) -> None:
    """3.6 takes int() of an array of one element, which NumPy 2.4 refuses. Later versions squeeze
    the array first; so does this."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_mend
