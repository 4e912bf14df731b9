"""What the logs of training runs say: scores, differences paired by seed, curves of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from deit.training.runs import RunFolder

POINTS = 60  # of a curve
# 97.5 % quantiles of Student's t by degrees of freedom, for the interval of a mean difference.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306,
             9: 2.262}  # fmt: skip


def entries(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return RunFolder(folder).entries()


def score(folder: Path, weights: str = "average") -> dict[str, float]:
    """Held-out top-1 in percent by head, of a run's last evaluation."""
    last = [entry for entry in entries(folder) if weights in entry][-1]
    return last[weights]["top1"]


def difference(treated: list[float], plain: list[float]) -> dict[str, Any]:
    """Mean of the paired differences, with its 95 % interval by Student's t over the seeds."""
    gains = [a - b for a, b in zip(treated, plain, strict=True)]
    summary: dict[str, Any] = {"gains": [round(g, 2) for g in gains], "gain": round(mean(gains), 3)}
    if len(gains) > 1:
        half = STUDENT_T[min(len(gains) - 1, 9)] * stdev(gains) / math.sqrt(len(gains))
        summary["interval"] = [round(mean(gains) - half, 3), round(mean(gains) + half, 3)]
    return summary


def curves(runs: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Mean training loss over the same spans of updates, of runs under any names.

    A line of a log is the mean since the line before it, and the lines of two runs end at other
    updates. So the sums are interpolated: a point is the mean over its span, by any log.

    Returns:
        {"updates": the spans' ends, name: [[a loss a span] a run], ...}; at most POINTS spans, and
        no more than the shortest log has lines.
    """
    logs = {
        name: [
            np.array([(e["update"], e["loss"]) for e in entries(f) if "loss" in e]) for f in all_
        ]
        for name, all_ in runs.items()
    }
    every = [log for each in logs.values() for log in each]
    edges = np.linspace(0, min(log[-1, 0] for log in every), min(POINTS, *map(len, every)) + 1)

    def means(log: np.ndarray) -> list[float]:
        ends = np.append(0, log[:, 0])
        sums = np.append(0, np.cumsum(np.diff(ends) * log[:, 1]))
        return (np.diff(np.interp(edges, ends, sums)) / np.diff(edges)).round(4).tolist()

    found = {name: [means(log) for log in each] for name, each in logs.items()}
    return {"updates": edges[1:].round(1).tolist(), **found}
