"""What every configuration of a Triton kernel has: which ones could run, and which are tried.

Shared memory is estimated from the tiles that a pipeline of `num_stages` keeps in flight. The
estimate only spares compilations: a candidate that the compiler refuses is dropped when it is
tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from deit.kernels.device.chips import SHARED_MEMORY

Arguments = Mapping[str, Any]  # of the factory that chose the configuration, by name
Choice = list[tuple[Any, str]]  # what a call is launched with, in order, and on what evidence
Choices = dict[str, Callable[..., Choice]]  # operator -> what its schema's arguments come to
# fp32 accumulators a thread: with 256 and the addresses the compiler spills (255 registers).
ACCUMULATORS = 128

_POWERS = {"block_m", "block_n", "block_k", "block_h", "chunk", "rows", "columns", "resident",
           "passing", "group", "block", "num_warps"}  # fmt: skip
# A file may hold any number. Tensor cores take tiles of 16 and more. `group` orders tiles, and
# `programs` counts those of a multiprocessor: past these limits neither has a meaning.
_RANGES = {
    "num_warps": (1, 32),
    "num_stages": (1, 8),
    "programs": (1, 32),
    "splits": (1, 16),
    "group": (1, 64),
    "rows": (1, 64),
    **dict.fromkeys(("block_m", "block_n", "block_k", "block_h", "chunk", "resident", "passing"),
                    (16, 4096)),
}  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """Tile sizes of one kernel, ints and bools alone; an operator's tiles.py derives its own.

    Nothing is tuned at call time, so a call never compiles more than one kernel and its result
    depends on nothing but its inputs: a factory (`tuning.tunable`) pins one configuration for
    each architecture, dtype and width, chosen from the arithmetic in its comment and from what
    the compiler reports for it (registers, spills, shared memory, matrix instructions:
    `python -m deit.kernels.prove.aot`). What a GPU has timed says so.
    """

    def illegal(self, arguments: Arguments) -> list[str]:
        """Why it cannot run, or would silently run as another one; empty where it can."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        found = [
            f"{name} is {value}, expected a power of two"
            for name, value in values.items()
            if name in _POWERS and not (value > 0 and value & (value - 1) == 0)
        ]
        found += [
            f"{name} is {values[name]}, expected {least} to {most}"
            for name, (least, most) in _RANGES.items()
            if not least <= values.get(name, least) <= most
        ]
        if found:
            return found
        arch, dtype = arguments.get("arch", 90), arguments.get("dtype", torch.bfloat16)
        if values.get("tma") and (arch not in (90, 100) or not arguments.get("tma", True)):
            found.append("tma: tensor copies are for sm_90 and sm_100, and inputs that suit them")
        found += self.rules(arguments)
        estimate, limit = self.shared_memory(arguments, dtype.itemsize), SHARED_MEMORY[arch]
        if estimate > limit:
            found.append(f"about {estimate} bytes of shared memory, sm_{arch} has {limit}")
        return found

    def rules(self, arguments: Arguments) -> list[str]:
        """As `illegal`: what holds for this kernel alone, of numbers within their ranges."""
        return []

    def shared_memory(self, arguments: Arguments, itemsize: int) -> int:
        """Bytes of the operand tiles in flight; 0 where a kernel keeps everything in registers."""
        return 0

    @classmethod
    def space(cls, arguments: Arguments, pinned: Any) -> Iterator[Any]:
        """What `deit tune` tries beside the pinned one, the most promising first, illegal ones
        among them; None stands for the other form of the operator."""
        return iter(())


def accumulators(rows: int, columns: int, warps: int, most: int = ACCUMULATORS) -> list[str]:
    """Why a tile has more accumulators than a thread can hold; empty where it has not."""
    each = rows * columns // (32 * warps)
    if each <= most:
        return []
    return [f"{each} accumulators a thread, {most} fit its registers"]
