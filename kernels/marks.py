"""Marks of a weight in CPU memory, by which a later call sees that somebody wrote to it.

Version counters count what PyTorch's operators write through the tensor. Writes through `.data`, a
flat buffer, a NumPy view, a collective or another process leave the counter alone, and memory is
the one witness. All of it is too much to read in every call: an 8-bit product reads a quarter of
those bytes. So a call reads a share of the 64-byte lines and compares their hashes
(csrc/cpu/marks.cpp).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deit.kernels import native

LINE = 64
GROUPS = 8  # of lines; one group is a line of every eighth row, all of them a line of every row
# Multiply-adds of an output channel that pay for looking at one of its lines. A line takes 20 ns,
# which is a hundredth of what they take: DeiT-Ti at 197 tokens looks at one group, DeiT-B at four.
_WORK = 300_000


class _Record(ctypes.Structure):
    """csrc/cpu/marks.cpp's DeitCpuMarks."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("turn", ctypes.c_int64),
        ("marks", ctypes.c_void_p),
    )


def possible(weight: Tensor) -> bool:
    """Whether marks of this tensor can be made: it is on the CPU, and the C++ library is there."""
    return weight.device.type == "cpu" and not native.why_not("cpu")


class Marks:
    """The marks of a tensor [M, ...] as it is now; whoever asks must see that it is not moved."""

    def __init__(self, weight: Tensor) -> None:
        extents = ((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
        count = (1 + sum(extents)) * weight.element_size() if weight.numel() else 0
        # One less than the lines of a row: the line that is looked at moves from row to row.
        columns = max(1, count // max(1, len(weight)) // LINE - 1)
        self._marks = torch.empty(GROUPS * columns, dtype=torch.int32)
        self._record = _Record(
            weight.data_ptr(), count, GROUPS * columns, columns, 0, self._marks.data_ptr()
        )
        self._make, self._has = native.cpu_marks()
        self._at = ctypes.addressof(self._record)
        self._make(self._at)

    def still_there(self, work: int | None = None) -> bool:
        """Whether the next lines in turn are as they were; every line has its turn.

        work: multiply-adds of an output channel in this call, whose hundredth may be spent; None
            to look at a line of every row.
        """
        looked = GROUPS if work is None else GROUPS * work // _WORK
        return bool(self._has(self._at, min(max(looked, 1), GROUPS)))
