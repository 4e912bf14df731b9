"""The row statistics that a product writes beside a stream, and a LayerNorm after it reads."""

from __future__ import annotations

from collections.abc import Sequence

# How many columns of a stream one pair of statistics covers (triton_row_stats.py).
STATS_COLUMNS = 64


def row_stats_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """[..., 2, parts] for a stream [..., D]: means, then sums of squares about them."""
    return (*shape[:-1], 2, -(-shape[-1] // STATS_COLUMNS))
