"""A paper model of data-parallel training on many GPUs: measured step, measured bytes, stated link.

Nothing here is measured beyond one device; the assumptions are part of the answer and are printed
with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BACKWARD_SHARE = 2 / 3  # of a step: two products backward for one forward


@dataclass(frozen=True)
class Link:
    """What connects the GPUs, one direction; none of it measured."""

    gbit_between: float = 400.0
    """Gbit/s of each GPU's own network port."""
    gbit_within: float = 3600.0
    """Gbit/s of each GPU to the others of its node."""
    per_node: int = 8
    """GPUs of a node."""
    latency_us: float = 5.0
    """Microseconds that one message takes at least."""

    def check(self) -> None:
        """Raises ValueError for what no link has."""
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"link {name}: expected a positive number; got {value}")


@dataclass(frozen=True)
class Step:
    """One device's training step: images, median seconds, and the gradients' bytes."""

    images: int
    seconds: float
    gradient_bytes: int


def all_reduce_seconds(size: float, count: int, link: Link) -> float:
    """Seconds to sum `size` bytes over `count` GPUs.

    In three stages: reduce-scatter within each node, all-reduce of each GPU's share between nodes,
    all-gather within. Each takes the bandwidth term of Rabenseifner's algorithm, 2 (p - 1) / p of
    the bytes, and 2 log2 p messages (Thakur, Rabenseifner and Gropp, 2005, section 4.5).
    """
    within = min(count, link.per_node)
    nodes = -(-count // link.per_node)
    seconds = 0.0
    for group, share, gbit in ((within, size, link.gbit_within),
                               (nodes, size / within, link.gbit_between)):  # fmt: skip
        if group > 1:
            seconds += 2 * (group - 1) / group * share / (gbit * 1e9 / 8)
            seconds += 2 * math.ceil(math.log2(group)) * link.latency_us * 1e-6
    return seconds


def model(step: Step, link: Link, counts: Sequence[int] = COUNTS) -> list[dict[str, Any]]:
    """For each number of GPUs: the step without and with overlap, images/s and efficiency.

    Raises ValueError for an impossible link.
    """
    link.check()
    rows = []
    for count in counts:
        summing = all_reduce_seconds(step.gradient_bytes, count, link)
        plain = step.seconds + summing
        hidden = step.seconds + max(0.0, summing - BACKWARD_SHARE * step.seconds)
        rows.append({
            "GPUs": count,
            "global batch": count * step.images,
            "all-reduce, ms": 1e3 * summing,
            "step, nothing hidden, ms": 1e3 * plain,
            "step, hidden by the backward, ms": 1e3 * hidden,
            "images/s at least": count * step.images / plain,
            "images/s at most": count * step.images / hidden,
            "efficiency at least, %": 100 * step.seconds / plain,
            "efficiency at most, %": 100 * step.seconds / hidden,
        })  # fmt: skip
    return rows


def assumptions(step: Step, link: Link, device: str) -> list[str]:
    """What the model takes as given, in sentences."""
    return [
        f"Measured: a step of {step.images} images on one {device} takes {1e3 * step.seconds:.4g} "
        f"ms (median); its gradients are {step.gradient_bytes / 1e6:.4g} MB, counted after a "
        "backward.",
        f"Stated, not measured: {link.gbit_between:g} Gbit/s a GPU between nodes, "
        f"{link.gbit_within:g} within, {link.per_node} GPUs a node, {link.latency_us:g} us a "
        "message.",
        "Every GPU is as fast as the one measured, and the slowest takes the median step too.",
        f"At most: the sum hides behind the backward, {BACKWARD_SHARE:.0%} of a step; at least: "
        "nothing is hidden.",
        "The batch a GPU stays; the global batch grows with the GPUs, past what any recipe of "
        "the paper trains with.",
        "Data arrives in time; no congestion, no failures, no checkpoints.",
    ]
