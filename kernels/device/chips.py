"""What a multiprocessor of each GPU family has, and how much of it a kernel fills.

Limits: CUDA C++ programming guide, "Technical specifications per compute capability".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A multiprocessor. block_shared and shared: bytes that one block may use, and all of them;
    warps, blocks: how many can be resident."""

    block_shared: int
    shared: int
    warps: int
    blocks: int


# By the families that need different tiles. 89 also stands for 86, which has 16 blocks where 89
# has 24, and 120 for 121.
CHIPS = {
    80: Chip(163 * 1024, 164 * 1024, warps=64, blocks=32),
    89: Chip(99 * 1024, 100 * 1024, warps=48, blocks=16),
    90: Chip(227 * 1024, 228 * 1024, warps=64, blocks=32),
    100: Chip(227 * 1024, 228 * 1024, warps=64, blocks=32),
    120: Chip(99 * 1024, 100 * 1024, warps=48, blocks=24),
}

# Shared memory that one thread block may use, in bytes.
SHARED_MEMORY = {arch: chip.block_shared for arch, chip in CHIPS.items()}

REGISTERS = 64 * 1024  # of every family, in four parts, given to a warp 256 at a time
_RESERVED = 1024  # bytes of shared memory that the system takes for each block
_TENSOR_COLUMNS = 512  # of tensor memory


def family(major: int, minor: int) -> int:
    """The key of CHIPS whose configurations serve compute capability major.minor."""
    if major == 8:
        return 80 if minor in (0, 7) else 89
    if major == 9:
        return 90
    if major in (10, 11):  # 11.0 is Thor: Blackwell with tensor memory, as 10.x
        return 100
    return 120


def resident_blocks(
    arch: int, warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> int:
    """Blocks of `warps` warps that a multiprocessor holds at once; 0 where none fits.

    registers: of a thread; shared: bytes of a block; tensor_columns: of tensor memory, sm_100's.
    """
    chip = CHIPS[arch]
    if shared > chip.block_shared:
        return 0
    each = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = REGISTERS // 4 // each * 4 // warps
    by_shared = chip.shared // (shared + _RESERVED)
    by_columns = _TENSOR_COLUMNS // tensor_columns if tensor_columns else chip.blocks
    return min(by_registers, by_shared, by_columns, chip.warps // warps, chip.blocks)
