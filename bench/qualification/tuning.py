"""`deit tune` as a stage: compiled by several processes, then measured by one that is alone."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from qualification.context import Context

PARTS = 8
CANDIDATES = 16


def tune(context: Context) -> None:
    """As a stage: a row for each kernel and shape. As a job: compile a part of the candidates."""
    import torch

    from deit import tune
    from deit.kernels.device import tuning
    from deit.kernels.prove import tune as tuner

    problems = tune.problems_of(_options(context), context.device)
    count = 2 if context.dry else CANDIDATES
    if context.job:
        tuner.warm(problems[int(context.job) :: PARTS], count)
        return
    end = context.deadline
    if not context.dry:
        context.deadline = end - 0.4 * context.left()  # compiling must leave time to measure
        context.fan_out([str(part) for part in range(PARTS)])

    def say(text: str) -> None:
        (context.skip if text.startswith(tuner.NO_TIME) else context.note)(text)

    outcomes, wrong = tuner.measure(problems, count, end, context.device, say)
    for text in wrong:
        context.fail(text)
    for found in outcomes:
        context.row(
            entry=found.name,
            n=tuner.ROUNDS,
            dropped=found.dropped,
            **{**asdict(found.entry), "config": str(found.config)},
        )
    if outcomes:
        name = "interpreter" if context.dry else torch.cuda.get_device_name(context.device)
        kept = tuning.store(name, {found.name: found.entry for found in outcomes})
        context.note(f"{len(outcomes)} of {len(problems)} kernels, kept in {kept.name}")


def _options(context: Context) -> Any:
    """DeiT-B first: where time is short, the others keep their defaults."""
    if context.dry:
        return SimpleNamespace(
            arch=("deit_ti",), dtype=("fp16",), batch_size=1, img_size=16, train=True,
            only=("layer_norm",),
        )  # fmt: skip
    return SimpleNamespace(
        arch=("deit_b", "deit_ti", "deit_s"), dtype=("bf16",), batch_size=256, img_size=None,
        train=True, only=(),
    )  # fmt: skip
