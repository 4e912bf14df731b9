"""Marks of a weight in CPU memory, by which a later call sees that somebody wrote to it.

Version counters count what PyTorch's operators write through the tensor. Writes through `.data`, a
flat buffer, a NumPy view, a collective or another process leave the counter alone, and memory is
the one witness. All of it is too much to read in every call: an 8-bit product reads a quarter of
those bytes. So a call reads a share of the 64-byte lines and compares their hashes
(csrc/cpu/marks.cpp).
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from deit.kernels.engine import native

LINE = 64
GROUPS = 64  # of lines; one group is a line of every 64th row, all of them a line of every row
# Multiply-adds of an output channel that pay for looking at a line of each row. A line takes 50 to
# 100 ns: it is in a page of its own, and seldom in a cache. That is a hundredth of the time that
# the multiply-adds take on two cores of a Zen 4. DeiT-Ti at 197 tokens looks at one group, DeiT-B
# at four.
ALL = 2_400_000
LEAST = 8  # lines that a call looks at, whatever it works


class _Record(ctypes.Structure):
    """csrc/cpu/marks.cpp's DeitCpuMarks."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("work", ctypes.c_int64),
        ("least", ctypes.c_int64),
        ("turn", ctypes.c_int64),
        ("marks", ctypes.c_void_p),
    )


@functools.cache
def _library() -> bool:
    return not native.why_not("cpu")


def possible(weight: Tensor) -> bool:
    """Whether marks of this tensor can be made: it is on the CPU, and the C++ library is there."""
    return weight.is_cpu and _library()


class Marks:
    """The marks of a tensor [M, ...] as it is now; whoever asks must see that it is not moved."""

    def __init__(self, weight: Tensor) -> None:
        extents = ((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
        count = (1 + sum(extents)) * weight.element_size() if weight.numel() else 0
        # One less than the lines of a row: the line that is looked at moves from row to row.
        columns = max(1, count // max(1, len(weight)) // LINE - 1)
        self._marks = torch.empty(GROUPS * columns, dtype=torch.int32)
        self._record = _Record(
            weight.data_ptr(),
            count,
            GROUPS * columns,
            columns,
            ALL // GROUPS,
            min(GROUPS, max(1, LEAST * GROUPS // max(1, len(weight)))),
            0,
            self._marks.data_ptr(),
        )
        make, has = native.cpu_marks()
        at = ctypes.addressof(self._record)
        make(at)
        # A partial, since a frame of Python costs as much here as the lines that are looked at.
        self._has = functools.partial(has, at)

    def still_there(self, work: int = ALL) -> bool:
        """Whether the next lines in turn are as they were; every line has its turn.

        work: multiply-adds of an output channel in this call, whose hundredth may be spent.
        """
        return bool(self._has(work))
